// The loudspeaker and the microphone.

const RATE = 16000; // of what the server hears
export const STEP = 0.064; // seconds of one level

const rms = (samples) => Math.sqrt(samples.reduce((sum, s) => sum + s * s, 0) / samples.length);

// Plays slices one behind the other and knows how many samples were heard.
export class Player {
  constructor(volume) {
    this.context = new AudioContext();
    this.gain = this.context.createGain();
    this.analyser = this.context.createAnalyser();
    this.gain.connect(this.context.destination);
    this.gain.connect(this.analyser);
    this.gain.gain.value = volume;
    this.sources = new Set();
    this.reset();
  }

  reset() {
    for (const source of this.sources ?? []) source.stop();
    this.next = 0;
    this.given = 0; // samples given out so far, at the server's rate
    this.spans = []; // {start, first, length, rate} of what was given out
  }

  // Gives the seconds until it is heard, and its levels.
  play(base64, rate) {
    const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
    const samples = Float32Array.from(new Int16Array(bytes.buffer), (s) => s / 32768);
    const buffer = this.context.createBuffer(1, samples.length, rate);
    buffer.copyToChannel(samples, 0);
    const source = this.context.createBufferSource();
    source.buffer = buffer;
    source.connect(this.gain);
    const start = Math.max(this.context.currentTime + 0.02, this.next);
    source.start(start);
    this.next = start + buffer.duration;
    this.sources.add(source);
    source.onended = () => this.sources.delete(source);
    this.spans.push({ start, first: this.given, length: samples.length, rate });
    this.given += samples.length;
    const size = Math.round(STEP * rate);
    const levels = Array.from({ length: Math.ceil(samples.length / size) }, (_, i) => rms(samples.subarray(i * size, (i + 1) * size)));
    return { delay: start - this.context.currentTime, levels };
  }

  // Counts sound that is not played.
  skip(base64) {
    this.given += atob(base64).length / 2;
  }

  get playing() {
    return this.next > this.context.currentTime;
  }

  // Samples that have been heard by now.
  heard() {
    const now = this.context.currentTime;
    let heard = this.spans[0]?.first ?? this.given;
    for (const { start, first, length, rate } of this.spans) {
      if (now > start) heard = first + Math.min(length, Math.round((now - start) * rate));
    }
    return heard;
  }

  // Silence at once. Gives the samples that were heard; the server counts later ones from there.
  stop() {
    const heard = this.heard();
    this.reset();
    return (this.given = heard);
  }

  level() {
    const samples = new Float32Array(this.analyser.fftSize);
    this.analyser.getFloatTimeDomainData(samples);
    return Math.max(...samples.map(Math.abs));
  }
}

const REASONS = {
  NotAllowedError: "The browser does not allow this page to use the microphone.",
  NotFoundError: "There is no microphone. You can type.",
  OverconstrainedError: "The microphone chosen in the settings is gone.",
  NotReadableError: "Another program is using the microphone.",
};

export class Microphone {
  // `heard(pcm, level)` for every 32 ms; `lost()` where the device goes away.
  constructor({ heard, lost }) {
    Object.assign(this, { heard, lost });
    this.wanted = null;
  }

  get on() {
    return this.wanted !== null;
  }

  // Throws an Error that says what is wrong; then, and where `close` came first, no track stays live.
  async open(device) {
    this.close();
    const wanted = (this.wanted = { stream: null, context: null });
    try {
      if (!navigator.mediaDevices?.getUserMedia) throw new Error("Browsers allow the microphone on https pages and on localhost only. You can type.");
      const audio = { channelCount: 1, echoCancellation: true, noiseSuppression: true, autoGainControl: true };
      if (device) audio.deviceId = { exact: device };
      wanted.stream = await navigator.mediaDevices.getUserMedia({ audio });
      wanted.context = new AudioContext({ sampleRate: RATE });
      await wanted.context.audioWorklet.addModule("/page/microphone.js");
      const node = new AudioWorkletNode(wanted.context, "microphone");
      node.port.onmessage = ({ data }) => {
        if (this.wanted === wanted) this.heard(Int16Array.from(data, (s) => Math.max(-1, Math.min(1, s)) * 32767).buffer, rms(data));
      };
      wanted.context.createMediaStreamSource(wanted.stream).connect(node);
      for (const track of wanted.stream.getTracks()) track.onended = () => this.wanted === wanted && (this.close(), this.lost());
    } catch (error) {
      if (this.wanted === wanted) this.wanted = null;
      release(wanted);
      throw Object.assign(new Error(REASONS[error.name] ?? `The microphone cannot be used (${error.message})`), { name: error.name });
    }
    if (this.wanted !== wanted) release(wanted);
  }

  close() {
    if (this.wanted) release(this.wanted);
    this.wanted = null;
  }
}

function release({ stream, context }) {
  for (const track of stream?.getTracks() ?? []) track.stop();
  if (context && context.state !== "closed") context.close();
}
