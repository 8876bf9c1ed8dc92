// The prompts over time: which one each block had, when it was asked for and when it was seen.

const SPAN = [24, 72];  // blocks across the track, at first and at most
const [LISTED, KEPT] = [3, 16];  // changes
const HUES = 5;  // --series-1 to -5 of page.css

export class Timeline {
  #track; #list; #shown = 0; #runs = []; #marks = []; #hues = new Map(); #changes = [];

  constructor(track, list) {
    [this.#track, this.#list] = [track, list];
  }

  clear() {
    [this.#shown, this.#runs, this.#marks, this.#changes] = [0, [], [], []];
    this.#draw();
    this.#write();
  }

  // A prompt is asked for; the value is told again to `arrived` when the first block that has it is seen.
  asked(prompt, mode) {
    const change = { prompt, mode, at: performance.now(), asked: this.#shown, block: null, seconds: 0, failed: false };
    this.#marks.push(change);
    this.#changes.unshift(change);
    this.#write();
    return change;
  }

  refused(change) {
    this.#marks = this.#marks.filter((mark) => mark !== change);
    this.#changes = this.#changes.filter((one) => one !== change);
    this.#write();
  }

  arrived(change, block) {
    [change.block, change.came, change.seconds] = [block, this.#shown, (performance.now() - change.at) / 1000];
    this.#write();
  }

  // A block begins to be seen. `jump`: it does not go on from the one before.
  block(prompt, index, jump) {
    const last = this.#runs.at(-1);
    if (last && last.prompt === prompt && !jump) last.to = this.#shown + 1;
    else this.#runs.push({ prompt, from: this.#shown, to: this.#shown + 1, index, jump });
    this.#shown += 1;
    while (this.#runs[0].to < this.#shown - SPAN[1]) this.#runs.shift();
    this.#draw();
  }

  hue(prompt) {
    if (!this.#hues.has(prompt)) this.#hues.set(prompt, (this.#hues.size % HUES) + 1);
    return this.#hues.get(prompt);
  }

  #draw() {
    const span = Math.min(Math.max(this.#shown, SPAN[0]), SPAN[1]);
    const from = Math.max(0, this.#shown - span);
    const place = (block) => `${Math.max(0, ((block - from) / span) * 100)}%`;
    const parts = this.#runs.map((run) => {
      const part = document.createElement("span");
      part.className = run.jump ? "run jump" : "run";
      part.dataset.hue = this.hue(run.prompt);
      part.style.left = place(run.from);
      part.style.width = `calc(${place(run.to)} - ${place(run.from)} - 2px)`;
      part.textContent = run.prompt;
      part.title = `from block ${run.index}: ${run.prompt}`;
      return part;
    });
    this.#marks = this.#marks.filter((mark) => mark.asked >= from);
    const marks = this.#marks.map((mark) => {
      const part = document.createElement("i");
      part.className = "asked";
      part.dataset.hue = this.hue(mark.prompt);
      part.style.left = place(mark.asked);
      part.style.width = `calc(${place(mark.came ?? this.#shown)} - ${place(mark.asked)})`;
      return part;
    });
    this.#track.replaceChildren(...parts, ...marks);
  }

  #write() {
    this.#changes.length = Math.min(this.#changes.length, KEPT);
    this.#list.replaceChildren(...this.#changes.slice(0, LISTED).map((change) => {
      const item = document.createElement("li");
      item.dataset.hue = this.hue(change.prompt);
      const text = document.createElement("span");
      text.textContent = change.prompt;
      const note = document.createElement("small");
      note.textContent = change.block === null ? "asked" : change.mode ? `${change.mode}, seen with block ${change.block} after ${change.seconds.toFixed(2)} s` : `from block ${change.block}`;
      item.append(text, note);
      return item;
    }));
  }
}
