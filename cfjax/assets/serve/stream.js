// The protocol of docs/serving.md: texts are JSON, and a block's frames follow its header as binary messages.

const VERSION = 1;
const HEADER = 12;  // bytes: "CFJX", uint32 block, uint16 frame, uint16 flags
const MAGIC = 0x43464a58;
const WAITS = [250, 500, 1000, 2000, 4000];  // ms before each attempt to come back

// A token is behind # in the page's address, which does not leave the browser.
const token = new URLSearchParams(location.hash.slice(1)).get("token");

export const fetchJson = async (path) => {
  const answer = await fetch(path, token ? { headers: { Authorization: `Bearer ${token}` } } : {});
  if (answer.status === 401) throw new Error("this server needs a token: open the page as …/#token=SECRET");
  if (!answer.ok) throw new Error(`${path}: ${answer.status}`);
  return answer.json();
};

// A WebSocket that is refused does not say why.
const refusal = async () => {
  const health = await fetch("healthz").catch(() => null);
  return !health ? "no server" : health.ok ? "the server is full" : "the model is getting ready";
};

// Events: state {state: connecting | live | lost | ended, reason}, and by the server's types ready, block (with its
// `images`), applied, snapshot, error.
export class Stream extends EventTarget {
  #socket = null; #open = null; #ready = null; #last = -1; #lost = 0; #tries = 0; #timer = 0; #header = null; #images = [];

  // A new session; the one before ends.
  open(settings) {
    this.close();
    this.#open = { type: "open", version: VERSION, ...settings };
    [this.#ready, this.#last, this.#lost, this.#tries] = [null, -1, 0, 0];
    this.#connect();
  }

  // Whether it was sent: not while the socket is lost.
  send(type, fields = {}) {
    const open = this.#socket?.readyState === WebSocket.OPEN;
    if (open) this.#socket.send(JSON.stringify({ type, ...fields }));
    return open;
  }

  close() {
    clearTimeout(this.#timer);
    this.send("close");
    const socket = this.#socket;
    this.#socket = null;  // first: what it still says is of no interest
    socket?.close();
  }

  #connect() {
    if (!this.#lost) this.#state("connecting");
    const address = new URL("v1/stream", document.baseURI);
    address.protocol = address.protocol.replace("http", "ws");
    address.hash = "";
    const socket = new WebSocket(address, token ? ["cfjax.v1", `cfjax.token.${token}`] : []);
    socket.binaryType = "arraybuffer";
    this.#socket = socket;
    this.#header = null;
    socket.addEventListener("open", () => {
      const back = this.#ready && { type: "reopen", version: VERSION, session: this.#ready.session, after: this.#last };
      socket.send(JSON.stringify(back || this.#open));
    });
    socket.addEventListener("message", ({ data }) => {
      if (socket !== this.#socket) return;
      if (typeof data === "string") this.#text(JSON.parse(data));
      else this.#image(data);
    });
    socket.addEventListener("close", () => { if (socket === this.#socket) this.#gone(); });
  }

  #text(message) {
    if (message.type === "block") {
      [this.#header, this.#images] = [message, []];
      return;  // it is told of with its images
    }
    if (message.type === "closed") {
      const socket = this.#socket;
      this.#socket = null;
      socket.close();
      this.#state("ended", message.reason);
      return;
    }
    this.#say(message.type, message);
    if (message.type !== "ready") return;
    [this.#ready, this.#lost, this.#tries] = [message, 0, 0];
    this.#state("live");
  }

  #image(data) {
    const view = new DataView(data);
    if (!this.#header || data.byteLength < HEADER || view.getUint32(0) !== MAGIC || view.getUint32(4) !== this.#header.index) return;
    this.#images.push(new Uint8Array(data, HEADER));
    if (this.#images.length < this.#header.frames) return;
    this.#last = this.#header.index;
    this.#say("block", { ...this.#header, images: this.#images });
    this.#header = null;
  }

  async #gone() {
    this.#socket = null;
    this.#lost ||= performance.now();
    if (this.#ready && performance.now() - this.#lost > 1000 * this.#ready.resume_seconds) {
      this.#state("ended", "lost");
      return;
    }
    this.#timer = setTimeout(() => this.#connect(), WAITS[Math.min(this.#tries++, WAITS.length - 1)]);
    if (this.#ready) this.#state("lost", "reconnecting");
    else {
      const reason = await refusal();
      if (!this.#ready) this.#state("lost", reason);
    }
  }

  #state(state, reason = "") { this.#say("state", { state, reason }); }

  #say(type, detail) { this.dispatchEvent(new CustomEvent(type, { detail })); }
}
