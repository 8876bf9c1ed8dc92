// Snapshots of the stream as a tree: a picture for each, and the way back to it.

const SIDE = 88;  // px of a thumbnail

export class Branches {
  #list; #hint; #nodes = new Map(); #current = null; #go;

  // go("restore" | "fork", id)
  constructor(list, hint, go) {
    [this.#list, this.#hint, this.#go] = [list, hint, go];
  }

  get current() { return this.#current; }

  clear() {
    this.#nodes.clear();
    this.#current = null;
    this.#list.replaceChildren();
    this.#hint.hidden = false;
  }

  add(id, block, prompt, picture) {
    const item = document.createElement("li");
    const card = document.createElement("div");
    card.className = "node";
    const back = document.createElement("button");
    back.type = "button";
    back.className = "back";
    const name = `block ${block}, ${prompt}`;
    back.title = `Back to ${name}`;
    back.setAttribute("aria-label", back.title);
    const label = document.createElement("span");
    label.innerHTML = `<b>block ${Number(block)}</b>`;
    label.append(prompt);
    back.append(thumbnail(picture), label);
    back.addEventListener("click", () => this.#go("restore", id));
    const fork = document.createElement("button");
    fork.type = "button";
    fork.className = "fork";
    fork.textContent = "New seed";
    fork.setAttribute("aria-label", `Back to ${name}, with a new seed`);
    fork.addEventListener("click", () => this.#go("fork", id));
    card.append(back, fork);
    item.append(card);
    const parent = this.#nodes.get(this.#current);
    this.#under(parent?.item).append(item);
    this.#nodes.set(id, { item, back });
    this.#hint.hidden = true;
    this.at(id);
    item.scrollIntoView({ block: "nearest", inline: "nearest" });
  }

  // The stream now goes on from this snapshot.
  at(id) {
    this.#current = id;
    for (const [other, { back }] of this.#nodes) {
      if (other === id) back.setAttribute("aria-current", "true");
      else back.removeAttribute("aria-current");
    }
  }

  #under(item) {
    if (!item) return this.#list;
    let children = item.querySelector(":scope > ul");
    if (!children) {
      children = document.createElement("ul");
      item.append(children);
    }
    return children;
  }
}

function thumbnail(picture) {
  const canvas = document.createElement("canvas");
  const scale = SIDE / Math.max(picture.width, picture.height);
  canvas.width = Math.round(picture.width * scale);
  canvas.height = Math.round(picture.height * scale);
  const context = canvas.getContext("2d");
  context.imageSmoothingEnabled = scale < 1;
  context.drawImage(picture, 0, 0, canvas.width, canvas.height);
  canvas.setAttribute("aria-hidden", "true");
  return canvas;
}
