"""Clients that do what no client should, in a process of their own: `python -m tests.serve.misbehave PLACE N S`."""

import asyncio
import json
import random
import sys
import time

import aiohttp

WORDS = ("hello there", "what is", "the capital of", "no wait", "stop it now", "and then")


async def misbehave(place: str, rng: random.Random, end: float) -> None:
    """Connects again and again, and each time does something else that no client should."""
    async with aiohttp.ClientSession() as http:
        while time.monotonic() < end:
            path = rng.choice(["/v1/duplex", "/v1/duplex", "/v1/realtime", "/v1/demo", "/"])
            try:
                async with asyncio.timeout(5), http.ws_connect(f"ws://{place}{path}") as ws:
                    if rng.random() < 0.7:
                        await ws.send_str(json.dumps({"type": "start", "slice_seconds": 0.2}))
                    match rng.randrange(8):
                        case 0:
                            await ws.send_str("x" * 10_000_000)
                        case 1:
                            for _ in range(1000):
                                await ws.send_str('{"type": "ping"}')
                        case 2:
                            await ws.send_bytes(rng.randbytes(rng.randint(1, 5000)))
                        case 3:
                            await ws.send_str(rng.choice(["{", "[]", "null", '{"type": 3}', "\x00", '{"type": "end"']))
                        case 4:  # vanishes in the middle of a frame
                            transport = ws._writer.transport
                            transport.write(b"\x81\xfe\x10\x00half")
                            transport.abort()
                        case 5:  # stalls: reads nothing
                            await ws.send_str(json.dumps({"type": "text", "text": "hello there"}))
                            await asyncio.sleep(rng.random() * 3)
                        case 6:
                            for kind in ("heard", "cancel", "resume", "snapshot", "end", "text", "slice"):
                                await ws.send_str(json.dumps({"type": kind, "slice": 9, "characters": -1}))
                        case 7:
                            for text in rng.choices(WORDS, k=12):
                                await ws.send_str(json.dumps({"type": "text", "text": text}))
                                await asyncio.sleep(0.1)
            except (aiohttp.ClientError, ConnectionError, TimeoutError):
                pass
            await asyncio.sleep(rng.random() / 5)


async def main(place: str, clients: int, seconds: float) -> None:
    """All of them at once, for so long."""
    end = time.monotonic() + seconds
    await asyncio.gather(*(misbehave(place, random.Random(i), end) for i in range(clients)))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3])))
