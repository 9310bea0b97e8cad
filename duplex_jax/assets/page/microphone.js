// Runs in the audio thread: hands out the microphone's samples in pieces of 32 ms.
class Microphone extends AudioWorkletProcessor {
  constructor() {
    super();
    this.piece = new Float32Array(512);
    this.filled = 0;
  }

  process(inputs) {
    const samples = inputs[0][0];
    if (samples === undefined) return true;
    for (const sample of samples) {
      this.piece[this.filled++] = sample;
      if (this.filled === this.piece.length) {
        this.port.postMessage(this.piece.slice());
        this.filled = 0;
      }
    }
    return true;
  }
}

registerProcessor("microphone", Microphone);
