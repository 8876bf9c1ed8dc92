// Recording of the canvas, in what the browser can encode.

const KINDS = [
  { name: "webm", types: ["video/webm;codecs=vp9", "video/webm;codecs=vp8", "video/webm"] },
  { name: "mp4", types: ["video/mp4;codecs=avc1.42E01E", "video/mp4;codecs=avc1", "video/mp4"] },
];
const RATE = 8_000_000;  // bits/s at most; small flat pictures take far less

const supported = (types) => types.find((type) => globalThis.MediaRecorder?.isTypeSupported(type));
const size = (bytes) => bytes < 1e6 ? `${Math.max(1, Math.round(bytes / 1e3))} kB` : `${(bytes / 1e6).toFixed(1)} MB`;

export class Recorder {
  #canvas; #list; #format; #changed; #recorder = null; #begun = 0; #count = 0;

  // changed(recording): when it begins and ends
  constructor(canvas, list, format, changed) {
    [this.#canvas, this.#list, this.#format, this.#changed] = [canvas, list, format, changed];
    for (const { name, types } of KINDS) if (supported(types)) format.add(new Option(name, name));
  }

  get possible() { return this.#format.length > 0; }
  get seconds() { return this.#recorder ? (performance.now() - this.#begun) / 1000 : 0; }

  toggle() { if (this.#recorder) this.stop(); else this.#start(); }

  stop() { if (this.#recorder?.state === "recording") this.#recorder.stop(); }

  #start() {
    const kind = KINDS.find(({ name }) => name === this.#format.value);
    const parts = [];
    const recorder = new MediaRecorder(this.#canvas.captureStream(), { mimeType: supported(kind.types), videoBitsPerSecond: RATE });
    recorder.addEventListener("dataavailable", ({ data }) => { if (data.size) parts.push(data); });
    recorder.addEventListener("stop", () => {
      const seconds = this.seconds;
      recorder.stream.getTracks().forEach((track) => track.stop());
      this.#recorder = null;
      this.#changed(false);
      this.#offer(new Blob(parts, { type: recorder.mimeType }), kind.name, seconds);
    });
    recorder.start(1000);
    this.#recorder = recorder;
    this.#begun = performance.now();
    this.#format.disabled = true;
    this.#changed(true);
  }

  #offer(blob, name, seconds) {
    this.#format.disabled = false;
    if (!blob.size) return;
    const item = document.createElement("li");
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = `cfjax-${++this.#count}.${name}`;
    link.textContent = `Download ${link.download}`;
    const note = document.createElement("span");
    note.textContent = `${seconds.toFixed(1)} s, ${size(blob.size)}`;
    const away = document.createElement("button");
    away.type = "button";
    away.textContent = "Discard";
    away.addEventListener("click", () => { URL.revokeObjectURL(link.href); item.remove(); });  // frees its memory
    item.append(link, note, away);
    this.#list.prepend(item);
    link.focus();
  }
}
