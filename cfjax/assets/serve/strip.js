// Numbers of the stream, as they come.

const KEPT = 120;  // blocks that percentiles are of
const SPARK = 40;  // blocks in the curve

const percentile = (values, share) => {
  const sorted = [...values].sort((a, b) => a - b);
  return sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))];
};
const ms = (value) => value === undefined ? ["–", ""] : value < 9.95 ? [value.toFixed(1), "ms"] : value < 999.5 ? [value.toFixed(0), "ms"] : [(value / 1000).toFixed(2), "s"];
const bytes = (value) => value < 1e6 ? [(value / 1e3).toFixed(0), "kB"] : value < 1e9 ? [(value / 1e6).toFixed(value < 1e7 ? 1 : 0), "MB"] : [(value / 1e9).toFixed(1), "GB"];

const TILES = [
  ["fps", "Frames/s"], ["first", "First frame"], ["p50", "Block, p50"], ["p95", "Block, p95"], ["lag", "Key to picture"], ["cache", "Cache"],
];

export class Strip {
  #tiles = {}; #blocks = []; #times = []; #opened = 0; #first; #lag; #cache; #fps = 0; #curve;

  constructor(list) {
    for (const [name, title] of TILES) {
      const tile = document.createElement("div");
      tile.innerHTML = `<dt>${title}</dt><dd data-value="${name}"><b>–</b> <small></small></dd>`;
      list.append(tile);
      this.#tiles[name] = tile.querySelector("dd");
    }
    this.#tiles.p50.insertAdjacentHTML("afterend", '<svg class="spark" viewBox="0 0 100 20" preserveAspectRatio="none" aria-hidden="true"><polyline/></svg>');
    this.#curve = list.querySelector("polyline");
    setInterval(() => this.#show(), 500);
  }

  opened() {
    this.#opened = performance.now();
    [this.#first, this.#lag, this.#blocks, this.#times] = [undefined, undefined, [], []];
  }

  ready({ fps }) { this.#fps = fps; }

  // What the server says of a block
  came({ ms: parts, cache_bytes: cache }) {
    this.#blocks.push(Object.values(parts).reduce((sum, part) => sum + part, 0));
    if (this.#blocks.length > KEPT) this.#blocks.shift();
    this.#cache = cache;
  }

  shown() {
    const now = performance.now();
    this.#first ??= now - this.#opened;
    this.#times.push(now);
    if (this.#times.length > 1 && now - this.#times[0] > 2500) this.#times = this.#times.filter((time) => now - time < 2000);
  }

  // From a request to the first frame that obeys it, ms
  lag(value) { this.#lag = value; }

  paused() { this.#times = []; }

  #show() {
    const times = this.#times;
    const rate = times.length > 2 ? (1000 * (times.length - 1)) / (times.at(-1) - times[0]) : undefined;
    this.#put("fps", rate === undefined ? ["–", this.#fps ? `of ${this.#fps}` : ""] : [rate.toFixed(1), `of ${this.#fps}`]);
    this.#put("first", ms(this.#first));
    this.#put("p50", ms(this.#blocks.length ? percentile(this.#blocks, 0.5) : undefined));
    this.#put("p95", ms(this.#blocks.length ? percentile(this.#blocks, 0.95) : undefined));
    this.#put("lag", ms(this.#lag));
    this.#put("cache", this.#cache === undefined ? ["–", ""] : bytes(this.#cache));
    const latest = this.#blocks.slice(-SPARK);
    const most = Math.max(...latest, 1e-9);
    this.#curve.setAttribute("points", latest.map((value, i) => `${(i / (SPARK - 1)) * 100},${19 - 18 * (value / most)}`).join(" "));
  }

  #put(name, [value, unit]) {
    const [number, small] = this.#tiles[name].children;
    number.textContent = value;
    small.textContent = unit;
  }
}
