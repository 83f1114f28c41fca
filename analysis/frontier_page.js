// The frontier's page: fills the Bokeh figure from the page's data, for the mean and the lines that are chosen.
"use strict";

const frontierPage = (() => {
  const data = JSON.parse(document.getElementById("page-data").textContent);
  const { settings, ways } = data;
  const GREY = "#9aa0ab";
  const few = settings.length <= 60; // of more, intervals, floors and values along lines hide each other
  const shown = { mean: data.mean, way: "size", intervals: few, floors: few };
  const KEYS = 40; // lines in the legend
  const LABEL = { letter: 6.3, height: 12, across: 8, up: 10 }; // pixels
  let figure = null; // the Bokeh models, by the names that frontier_page.py gives them
  let current = null; // the number of the chosen setting

  const { make, number } = elements;
  const panel = frontierPanel(data, choose);
  const byId = (id) => document.getElementById(id);
  const valueOf = (setting) => setting.means[shown.mean];

  /** Edges of the nonsense circuits of the tasks that the mean is over, as many times the mean; null if none. */
  function floorOf(setting) {
    const { mean } = valueOf(setting);
    const times = setting.floors[shown.mean]?.times ?? null;
    return mean === null || times === null ? null : mean * times;
  }

  function fillControls() {
    const titles = Object.fromEntries(Object.entries(ways).map(([way, { title }]) => [way, title]));
    byId("controls").append(
      choice("mean", "mean over", data.means), choice("way", "draw", titles),
      box("intervals", "intervals"), box("floors", "nonsense floor"),
    );
    byId("controls").addEventListener("submit", (event) => event.preventDefault());
  }

  function choice(name, title, options) {
    const list = make("select", { id: name });
    const option = ([value, text]) => make("option", { value, textContent: text, selected: value === shown[name] });
    list.append(...Object.entries(options).map(option));
    list.addEventListener("change", () => { shown[name] = list.value; draw(); });
    return make("label", {}, `${title} `, list);
  }

  function box(name, title) {
    const mark = make("input", { type: "checkbox", id: name, checked: shown[name] });
    mark.addEventListener("change", () => { shown[name] = mark.checked; draw(); });
    return make("label", {}, mark, ` ${title}`);
  }

  /** Ranges that hold every point, its interval and its floor as far as they are drawn, and the upper edge. */
  function ranges() {
    const values = settings.flatMap((s) => {
      const { mean, interval } = valueOf(s);
      return [mean, ...((shown.intervals && interval) || []), shown.floors ? floorOf(s) : null];
    }).filter((v) => v !== null);
    const losses = settings.flatMap((s) => [s.loss, ...((shown.intervals && s.loss_interval) || [])]);
    const [low, high] = [Math.min(...values, 1e9), Math.max(...values, 1)];
    const room = 0.06 * (Math.max(...losses) - Math.min(...losses)) || 0.1;
    const span = Math.max(high / Math.min(low, high), 1.5);
    return {
      x: [Math.min(...losses) - room, Math.max(...losses) + room],
      y: [Math.min(low, high) / span ** 0.06, high * span ** 0.14], edge: high * span ** 0.1,
    };
  }

  function draw() {
    const { x, y, edge } = ranges();
    const colour = settings.map(() => GREY);
    for (const line of ways[shown.way].lines) for (const i of line.settings) colour[i] = line.colour;
    const heights = settings.map((s) => valueOf(s).mean ?? edge);
    figure.lines.data = lineColumns();
    figure.intervals.data = intervalColumns(colour);
    figure.floors.data = floorColumns(heights, colour);
    const on = settings.flatMap((s, i) => (valueOf(s).pareto ? [i] : []));
    figure.rings.data = { x: on.map((i) => settings[i].loss), y: on.map((i) => heights[i]) };
    figure.points.data = {
      x: settings.map((s) => s.loss), y: heights, colour,
      marker: settings.map((s) => (valueOf(s).mean === null ? "inverted_triangle" : s.dense ? "diamond" : "circle")),
      alpha: settings.map((s) => 0.1 + 0.9 * (s.n_asked ? s.n_reached / s.n_asked : 0)),
      name: settings.map((s) => s.name), told: settings.map(told),
    };
    figure.frontier.x_range.setv({ start: x[0], end: x[1], reset_start: x[0], reset_end: x[1] });
    figure.frontier.y_range.setv({ start: y[0], end: y[1], reset_start: y[0], reset_end: y[1] });
    byId("meaning").textContent = data.meanings[shown.mean];
    fillLegend();
    mark();
    moved();
    if (current === null) panel.show(null, shown.mean);
  }

  function lineColumns() {
    const able = ways[shown.way].lines.map((line) => ({
      colour: line.colour, settings: line.settings.filter((i) => valueOf(settings[i]).mean !== null),
    })).filter((line) => line.settings.length > 1);
    return {
      xs: able.map((line) => line.settings.map((i) => settings[i].loss)),
      ys: able.map((line) => line.settings.map((i) => valueOf(settings[i]).mean)),
      colour: able.map((line) => line.colour),
    };
  }

  function intervalColumns(colour) {
    const columns = { x0: [], y0: [], x1: [], y1: [], colour: [] };
    const add = (...ends) => Object.values(columns).forEach((column, i) => column.push(ends[i]));
    settings.forEach((s, i) => {
      const { mean, interval } = valueOf(s);
      if (!shown.intervals || mean === null) return;
      if (interval) add(s.loss, interval[0], s.loss, interval[1], colour[i]);
      if (s.loss_interval) add(s.loss_interval[0], mean, s.loss_interval[1], mean, colour[i]);
    });
    return columns;
  }

  function floorColumns(heights, colour) {
    const with_floor = settings.flatMap((s, i) => (shown.floors && floorOf(s) !== null ? [i] : []));
    return {
      x: with_floor.map((i) => settings[i].loss), y: with_floor.map((i) => heights[i]),
      top: with_floor.map((i) => floorOf(settings[i])), colour: with_floor.map((i) => colour[i]),
    };
  }

  /** What is said of a setting where the mouse is. */
  function told(s) {
    const { mean, interval, at_least } = valueOf(s);
    const range = interval ? ` [${interval.map((v) => number(v)).join(", ")}]` : "";
    const edges = mean === null ? "no such mean" : `${at_least ? "at least " : ""}${number(mean)} edges${range}`;
    const { times, n_reached, n_asked } = s.floors[shown.mean] ?? s.floors.own;
    const open = s.n_open ? `, ${s.n_open} not finished` : "";
    const nonsense = `${n_reached} of ${n_asked} found${times === null ? "" : `, ${number(times)} times as large`}`;
    return [
      `loss ${number(s.loss, 4)}, ${edges}`, `tasks reached: ${s.n_reached} of ${s.n_asked} over all seeds${open}`,
      `${s.n_nonzero.toLocaleString()} of ${s.n_params.toLocaleString()} weights, seeds ${seeds(s)}`,
      `nonsense circuits: ${nonsense}`,
    ].join("<br>");
  }

  const seeds = (s) => s.models.map((model) => model.seed).join(", ");

  function fillLegend() {
    const { lines } = ways[shown.way];
    const key = (line) =>
      make("span", { className: "line" }, make("span", { className: "key", style: `border-color:${line.colour}` }),
        make("span", { textContent: line.name }));
    byId("legend").replaceChildren(
      ...lines.slice(0, KEYS).map(key),
      lines.length > KEYS ? `and ${lines.length - KEYS} more lines. ` : "",
      make("span", {}, "◆ dense, ▼ no such mean, ringed: on the front. Points are filled by how many tasks are " +
        "reached; the count stands beside them where there is room, and in the table."),
    );
  }

  /** Labels beside the points, each where it hides nothing; called again when the picture is moved or zoomed. */
  function moved() {
    clearTimeout(moved.later);
    moved.later = setTimeout(() => { figure.labels.data = labelColumns(); }, 50);
  }

  function labelColumns() {
    const { x_range, y_range } = figure.frontier;
    const [width, height] = [figure.frontier.inner_width, figure.frontier.inner_height];
    const { x, y } = figure.points.data;
    const log = Math.log;
    const px = settings.map((_, i) => [
      (width * (x[i] - x_range.start)) / (x_range.end - x_range.start),
      height * (1 - log(y[i] / y_range.start) / log(y_range.end / y_range.start)),
    ]);
    const taken = px.map(([a, b]) => [a - 6, b - 6, a + 6, b + 6]);
    const columns = { x: [], y: [], text: [], dx: [], dy: [], align: [] };
    settings.forEach((s, i) => {
      const count = `${valueOf(s).at_least ? "↑ " : ""}${s.n_reached}/${s.n_asked}`;
      const long = [few ? ways[shown.way].varied[i] : "", count].filter(Boolean).join(", ");
      for (const text of new Set([long, count])) {
        const place = freePlace(px[i], text.length * LABEL.letter, taken, width, height);
        if (!place) continue;
        taken.push(place.box);
        [x[i], y[i], text, place.dx, place.dy, place.align].forEach((v, j) => Object.values(columns)[j].push(v));
        return;
      }
    });
    return columns;
  }

  /** Beside a point, off its intervals if there is room: the first place that is inside the picture and free. */
  function freePlace([a, b], length, taken, width, height) {
    const { across, up, height: tall } = LABEL;
    const free = ([l, t, r, m]) =>
      l >= 0 && t >= 0 && r <= width && m <= height &&
      !taken.some(([l2, t2, r2, m2]) => l < r2 && l2 < r && t < m2 && t2 < m);
    const sides = [[across, "left"], [-across, "right"]];
    const places = [-up, up, 0].flatMap((dy) => sides.map(([dx, align]) => [dx + dx * !dy, dy, align]));
    for (const [dx, dy, align] of places) {
      const left = align === "left" ? a + dx : a + dx - length;
      const box = [left, b + dy - tall / 2, left + length, b + dy + tall / 2];
      if (free(box)) return { box, dx, dy, align };
    }
    return null;
  }

  /** Called by Bokeh when a point is tapped. */
  function tapped() {
    const [i] = figure.points.selected.indices;
    if (i !== current && (i !== undefined || current !== null)) choose(i ?? null);
  }

  /** Show a setting's panel; null goes back to the overview. */
  function choose(i) {
    current = i;
    figure.points.selected.indices = i === null ? [] : [i];
    mark();
    panel.show(i, shown.mean);
  }

  function mark() {
    const { x, y } = figure.points.data;
    figure.chosen.data = current === null ? { x: [], y: [] } : { x: [x[current]], y: [y[current]] };
  }

  async function start() {
    fillControls();
    await Bokeh.embed.embed_item(JSON.parse(byId("figure-data").textContent));
    const names = ["frontier", "lines", "intervals", "floors", "rings", "points", "chosen", "labels"];
    figure = Object.fromEntries(names.map((name) => [name, Bokeh.documents[0].get_model_by_name(name)]));
    draw();
    figure.labels.data = labelColumns();
    addEventListener("keydown", (event) => { if (event.key === "Escape") choose(null); });
    document.body.dataset.ready = "yes";
  }

  return { start, tapped, moved };
})();

frontierPage.start();
