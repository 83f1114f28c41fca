// What pages are built of: elements, numbers in words, and text whose tokens are coloured by a value. No state.
"use strict";

const elements = (() => {
  /** A new element; properties with a dash are attributes; children are appended, null ones left out. */
  function make(tag, properties = {}, ...children) {
    const element = document.createElement(tag);
    for (const [key, value] of Object.entries(properties)) {
      if (key.includes("-")) element.setAttribute(key, value);
      else element[key] = value;
    }
    element.append(...children.filter((child) => child !== null));
    return element;
  }

  const note = (text) => make("p", { className: "note", textContent: text });
  const number = (value, digits = 3) =>
    value === null ? "not measured" : Number(value.toPrecision(digits)).toString();
  const signed = (value) => (value > 0 ? "+" : "") + number(value);
  const signClass = (value) => (value > 0 ? "positive" : "negative");
  const quoted = (text) => JSON.stringify(text);
  const visible = (text) => text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "·") || "(empty)";

  /** Tokens as text, each coloured by its value if there are values; the one at `peak` is framed. */
  function heat(texts, values, scale, peak = -1) {
    const tokens = texts.map((text, i) => {
      const title = values ? `${quoted(text)}  ${number(values[i])}` : quoted(text);
      const span = make("span", { className: i === peak ? "token peak" : "token", title }, ...readable(text));
      if (values && values[i]) span.style.backgroundColor = shade(values[i] / scale);
      return span;
    });
    return make("pre", { className: "heat" }, ...tokens);
  }

  function shade(share) {
    const opacity = 0.1 + 0.75 * Math.min(1, Math.abs(share));
    return `rgba(${share > 0 ? "70, 140, 214" : "226, 98, 72"}, ${opacity.toFixed(3)})`;
  }

  /** A token's text, with line ends and tabs as signs before what they do. */
  function readable(text) {
    return text.split(/([\n\t])/).flatMap((part) => {
      if (part === "\n") return [make("i", { textContent: "↵" }), "\n"];
      if (part === "\t") return [make("i", { textContent: "⇥" }), "\t"];
      return part ? [part] : [];
    });
  }

  return { make, note, number, signed, signClass, quoted, visible, heat };
})();
