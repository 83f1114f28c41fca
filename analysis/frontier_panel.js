// The panel beside the frontier: a setting with its runs, tasks and circuits, or the settings on the front.
"use strict";

function frontierPanel(data, choose) {
  const { make, note, number } = elements;
  const TITLES = { n_edges: "edges", n_nodes: "nodes", task_loss: "held-out loss", completeness_loss: "without", kl: "KL" };

  function show(i, mean) {
    const parts = i === null ? overview(mean) : setting(data.settings[i]);
    document.getElementById("panel").replaceChildren(...parts);
  }

  function overview(mean) {
    const on = data.settings.flatMap((s, i) => (s.means[mean].pareto ? [i] : []));
    on.sort((a, b) => data.settings[a].loss - data.settings[b].loss);
    const none = "Nothing: no setting has a mean that is more than a bound.";
    return [
      make("h2", { textContent: "On the front" }),
      note("No other setting has both a lower loss and smaller circuits. Click a point, or one of these."),
      make("div", { className: "rows" }, ...on.map((i) => button(i, mean))),
      ...(on.length ? [] : [note(none)]),
    ];
  }

  function button(i, mean) {
    const s = data.settings[i];
    const row = make(
      "button", { className: "row", type: "button", "data-setting": String(i) },
      make("code", { textContent: s.name }), make("span", { className: "value", textContent: number(s.loss, 4) }),
      make("span", { className: "value", textContent: number(s.means[mean].mean) }),
    );
    row.addEventListener("click", () => choose(i));
    return row;
  }

  function setting(s) {
    const close = make("button", { className: "close", type: "button", textContent: "×", title: "back (Escape)" });
    close.addEventListener("click", () => choose(null));
    const without = s.models.some((m) => m.outcomes.some((outcome) => outcome?.at(-1)?.toString().endsWith("/")));
    const words = "Of circuits without a page the folder is linked; `sparsetrain frontier --pages` writes their pages.";
    return [
      close, make("h2", { id: "chosen", textContent: s.name }), facts(s), ...s.models.flatMap(model),
      without ? note(words) : "",
    ];
  }

  function facts(s) {
    const of = { sweep: s.sweep, arm: s.arm || "none", ...s.values, nonzero: count(s.n_nonzero), weights: count(s.n_params) };
    const fact = ([key, value]) => make("span", {}, make("i", { textContent: key }), ` ${value}`);
    return make("p", { className: "facts" }, ...Object.entries(of).map(fact));
  }

  const count = (n) => Math.round(n).toLocaleString();

  function model(m) {
    const reached = m.outcomes.filter((outcome) => outcome && outcome.length > 1).length;
    const head = make("h3", {}, `seed ${m.seed}: loss ${number(m.loss, 4)}, ${reached} of ${m.outcomes.filter(Boolean).length} tasks reached`);
    const run = m.run ? make("p", {}, link(`${m.run}/`, m.point), " ", link(`${m.run}/config.yaml`, "config")) : null;
    return [head, run ?? note(`${m.point}: its run directory is not beside this page`), table(m)];
  }

  const link = (href, text) => make("a", { href }, ...broken(text));

  /** A name that may go on in the next line after each underscore. */
  const broken = (name) => name.split(/(?<=_)/).flatMap((part) => [part, make("wbr")]);

  function table(m) {
    const head = cells("th", ["task", ...data.panel.map((key) => TITLES[key])]);
    const rows = data.tasks.map((task, t) => outcome(task, m.outcomes[t]));
    return make("table", { className: "outcomes" }, make("thead", {}, head), make("tbody", {}, ...rows));
  }

  const cells = (kind, values) => make("tr", {}, ...values.map((v) => make(kind, {}, ...[v].flat())));

  function outcome(task, found) {
    if (!found || found.length === 1) {
      const words = make("small", { textContent: found ? `not reached: ${found[0]}` : "no outcome yet" });
      return make("tr", {}, make("td", {}, ...broken(task)), make("td", { colSpan: data.panel.length }, words));
    }
    const [href, numbers] = [found.at(-1), found.slice(0, -1)];
    return cells("td", [href ? link(href, task) : broken(task), ...numbers.map((v) => (v === null ? "" : number(v)))]);
  }

  return { show };
}
