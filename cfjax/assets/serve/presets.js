// Prompts at a click: for a model of few words all of them, else its examples and the latest ones that were written.

const LATEST = 6;

// `vocabulary` of /api/model: {colours, shapes, directions}; every choice is a prompt. A model that is steered has no directions.
export class Words {
  #groups; #choose;

  constructor(box, vocabulary, choose) {
    this.#choose = choose;
    this.#groups = [["Colour", vocabulary.colours], ["Shape", vocabulary.shapes], ["Moving", vocabulary.directions]].filter(([, words]) => words.length).map(([title, words]) => {
      const group = document.createElement("fieldset");
      group.className = "words";
      group.innerHTML = `<legend>${title}</legend>`;
      for (const word of words) {
        const label = document.createElement("label");
        const input = Object.assign(document.createElement("input"), { type: "radio", name: `word-${title}`, value: word });
        const text = document.createElement("span");
        text.append(Object.assign(document.createElement("i"), { className: "sign" }), word);
        label.dataset.word = word;
        label.append(input, text);
        group.append(label);
      }
      group.addEventListener("change", () => this.#chosen());
      box.append(group);
      return { group, words };
    });
  }

  // Marks the words of a prompt.
  show(prompt) {
    const said = prompt.toLowerCase().split(/\s+/);
    for (const { group, words } of this.#groups) {
      const word = words.find((one) => said.includes(one));
      for (const input of group.querySelectorAll("input")) input.checked = input.value === word;
    }
  }

  #chosen() {
    const [colour, shape, direction] = this.#groups.map(({ group, words }) => group.querySelector("input:checked")?.value ?? words[0]);
    this.#choose(direction ? `a ${colour} ${shape} moving ${direction}` : `a ${colour} ${shape}`);
  }
}

export class Latest {
  #box; #choose; #prompts = [];

  constructor(box, examples, choose) {
    [this.#box, this.#choose] = [box, choose];
    box.classList.add("latest");
    [...examples].reverse().forEach((prompt) => this.show(prompt));
  }

  show(prompt) {
    this.#prompts = [prompt, ...this.#prompts.filter((one) => one !== prompt)].slice(0, LATEST);
    this.#box.replaceChildren(...this.#prompts.map((one) => {
      const button = Object.assign(document.createElement("button"), { type: "button", textContent: one, title: one });
      button.addEventListener("click", () => this.#choose(one));
      return button;
    }));
  }
}
