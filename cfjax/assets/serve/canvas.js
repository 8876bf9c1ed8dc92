// Playback: frames wait in a buffer and are drawn at the stream's pace, not in the bursts that they arrive in.

const SIDE = 512;  // px: smaller videos are drawn enlarged by a whole factor, so that recordings have sharp pixels
const SPARE = 40;  // ms that a block should come before it is needed

// Events: shown {block, frame}, once per drawn frame.
export class Player extends EventTarget {
  #canvas; #context; #acknowledge; #queue = []; #decoded = Promise.resolve(); #course = 0;
  #fps = 8; #frames = 1; #most = 3; #due = 0; #slower = 1; #starved = true; #paused = false;
  #unacknowledged = []; #sent = new Map(); #way = 0;

  constructor(canvas, acknowledge) {
    super();
    this.#canvas = canvas;
    this.#context = canvas.getContext("2d", { alpha: false });
    this.#acknowledge = acknowledge;
    this.latest = document.createElement("canvas");  // the newest frame that has come, drawn or not
    const tick = (now) => { this.#tick(now); requestAnimationFrame(tick); };
    requestAnimationFrame(tick);
  }

  ready({ width, height, fps, frames_per_block: frames, queue, resumed }) {
    if (resumed) return;
    const scale = Math.max(1, Math.floor(SIDE / Math.max(width, height)));
    [this.#canvas.width, this.#canvas.height] = [width * scale, height * scale];
    [this.latest.width, this.latest.height] = [width, height];
    this.#canvas.classList.toggle("enlarged", scale > 1);
    this.#canvas.parentElement.style.setProperty("--shape", `${width} / ${height}`);
    this.#context.imageSmoothingEnabled = false;
    [this.#fps, this.#frames, this.#most, this.#slower, this.#way] = [fps, frames, queue, 1, 0];
    this.flush();
    this.#unacknowledged = [];  // of the session before
    this.#sent.clear();
  }

  push(block) {
    const asked = this.#sent.get(block.index - this.#most);
    if (asked) {
      const way = performance.now() - asked;
      this.#way = way > this.#way ? way : 0.9 * this.#way + 0.1 * way;
      this.#sent.delete(block.index - this.#most);
    }
    const course = this.#course;
    const pictures = Promise.all(block.images.map((data) => createImageBitmap(new Blob([data], { type: `image/${block.format}` }))));
    pictures.catch(() => {});  // looked at below, in its turn
    this.#decoded = this.#decoded.then(async () => {
      const bitmaps = await pictures.catch(() => []);
      if (bitmaps.length) this.latest.getContext("2d").drawImage(bitmaps.at(-1), 0, 0);
      if (course === this.#course && bitmaps.length) {
        bitmaps.forEach((bitmap, frame) => this.#queue.push({ block, frame, bitmap }));
      } else {
        bitmaps.forEach((bitmap) => bitmap.close());
        this.#done(block);
      }
    });
  }

  // Leaves out what has not been drawn yet: the stream went elsewhere.
  flush() {
    this.#course += 1;
    for (const { block, bitmap } of this.#queue.splice(0)) {
      bitmap.close();
      this.#done(block);
    }
    this.#starved = true;
  }

  set paused(value) {
    this.#paused = value;
    this.#sent.clear();  // what comes after a pause was not on its way for so long
  }

  #tick(now) {
    if (this.#paused) return;
    const interval = (1000 * this.#slower) / this.#fps;
    if (!this.#queue.length) {
      if (this.#starved || now < this.#due) return;
      this.#starved = true;  // the stream is slower than its pace: go slower too, rather than in bursts
      this.#slower = Math.min(1.15 * this.#slower, 16);
      return;
    }
    if (now < this.#due) return;
    this.#starved = false;
    this.#due = Math.max(this.#due + interval, now + interval / 2);  // after a late frame the next ones do not hurry
    this.#draw(this.#queue.shift(), interval);
  }

  #draw({ block, frame, bitmap }, interval) {
    this.#context.drawImage(bitmap, 0, 0, this.#canvas.width, this.#canvas.height);
    bitmap.close();
    this.dispatchEvent(new CustomEvent("shown", { detail: { block, frame } }));
    const [last, left] = [frame === block.frames - 1, (block.frames - frame) * interval];
    if (last && this.#queue.length) this.#slower = Math.max(0.97 * this.#slower, 1);
    if (last || left <= this.#lead(interval) % (block.frames * interval)) this.#done(block, interval);
  }

  // How long before it is needed a block has to be asked for, ms.
  #lead(interval) {
    return Math.min(1.5 * this.#way + SPARE + interval, (this.#most - 0.01) * this.#frames * interval);
  }

  // An acknowledgement lets the server make one more block. It is held back until that block is due, so that a prompt or
  // a key is seen as soon as may be: a block that was made in advance knows nothing of it.
  #done(block, interval = 1000 / this.#fps) {
    if (!this.#unacknowledged.includes(block.index) && !this.#sent.has(block.index)) this.#unacknowledged.push(block.index);
    const ahead = Math.floor(this.#lead(interval) / (this.#frames * interval));
    while (this.#unacknowledged.length > Math.max(0, this.#most - 1 - ahead)) {
      const index = this.#unacknowledged.shift();
      this.#sent.set(index, performance.now());
      this.#acknowledge(index);
    }
  }
}
