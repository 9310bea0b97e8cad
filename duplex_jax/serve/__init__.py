"""The real-time server: many live sessions on one engine and a slice clock, over several protocols."""
