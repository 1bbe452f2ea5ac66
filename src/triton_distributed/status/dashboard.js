"use strict";
// Asks /statistics and /statistics/history once a second and draws the answers. It fetches nothing else.

const EVERY_MS = 1000;    // between two questions
const PATIENCE_MS = 1500; // for one answer; while the event loop is stuck, the port answers within a second
const WINDOW_S = 300;     // what the plots show at most
const SHORT_S = 60;       // what they show at least, of a process that has just begun
const COLOURS = 8;        // series that are drawn: more could not be told apart
const LATE_S = 0.1;       // lag of the event loop that is a problem: all requests feel it

const GROUPS = ["endpoints", "calls"];
let past = empty();       // the columns of /statistics/history so far
let now = null;           // the last answer of /statistics
let traffic = null;       // bytes per second, received and sent
let answeredAt = null;    // when the port answered last
let silent = false;       // the last question got no answer
let pointedAt = null;     // where the mouse points in a plot: 0 at its left end, 1 at its right end
const colours = {endpoints: {}, calls: {}};

function empty() { return {times: [], loop_lag_s: [], endpoints: {}, calls: {}}; }

// ---- elements

const $ = (id) => document.getElementById(id);

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function shape(tag, attributes = {}, text = "") {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.textContent = text;
  return made;
}

// ---- numbers as text

function scaled(value, base, units) {
  let unit = "";
  for (const each of units) {
    if (value < base * 0.9995) break;
    value /= base;
    unit = each;
  }
  return (value < 9.95 ? value.toFixed(1).replace(/\.0$/, "") : Math.round(value).toString()) + unit;
}

const count = (value) => value < 9999.5 && value >= 9.95 ? Math.round(value).toLocaleString("en") : scaled(value, 1000, ["k", "M", "G", "T"]);
const bytes = (value) => value < 1024 ? `${Math.round(value)} B` : scaled(value, 1024, [" KiB", " MiB", " GiB", " TiB"]);

function seconds(value) {
  const [unit, size] = value >= 1 ? ["s", 1] : value >= 0.001 ? ["ms", 0.001] : ["µs", 0.000001];
  return `${Number((value / size).toPrecision(value / size >= 100 ? 3 : 2))} ${unit}`;
}

const clock = (time) => new Date(time * 1000).toLocaleTimeString();

// `namespace/components/component/endpoint` with dots, unless a part contains one.
function dotted(path) {
  const found = /^(.+?)\/components\/([^/]+)\/(.+)$/.exec(path);
  return found && !path.includes(".") ? found.slice(1).join(".") : path;
}

// ---- the last minutes

function keep(more) {
  const length = past.times.push(...more.times);
  past.loop_lag_s.push(...more.loop_lag_s);
  const drop = Math.max(0, past.times.findIndex((time) => time > more.now - WINDOW_S - 2));
  past.times.splice(0, drop);
  past.loop_lag_s.splice(0, drop);
  for (const group of GROUPS) {
    for (const path of new Set([...Object.keys(past[group]), ...Object.keys(more[group])])) {
      const known = past[group][path] ?? {}, added = more[group][path] ?? {};
      for (const name of new Set([...Object.keys(known), ...Object.keys(added)])) {
        const values = [...(known[name] ?? []), ...(added[name] ?? [])];
        const missing = Array(length - values.length).fill(null);
        known[name] = (known[name] ? [...values, ...missing] : [...missing, ...values]).slice(drop);
      }
      past[group][path] = known;
      if (Object.values(known).every((values) => values.every((value) => value === null))) delete past[group][path];
    }
  }
}

// What a column of totals grew by in a second.
function rates(values) {
  return (values ?? []).map((value, at) => {
    const former = at ? values[at - 1] : null;
    return value === null || former === null || value < former ? null : (value - former) / (past.times[at] - past.times[at - 1]);
  });
}

// What ended in a second without what was refused.
function ended(columns, total) {
  const refused = rates(columns.refused);
  return rates(columns[total]).map((value, at) => value === null ? null : value - (refused[at] ?? 0));
}

const last = (values) => values?.length ? values[values.length - 1] : null;

const span = () => Math.min(WINDOW_S, Math.max(SHORT_S, last(past.times) - past.times[0]));

function nearest(time) {
  let best = 0;
  past.times.forEach((each, at) => { if (Math.abs(each - time) < Math.abs(past.times[best] - time)) best = at; });
  return best;
}

// ---- plots

const SHORTEST_S = 0.0001; // shorter times lie on the axis: the histograms begin here
const HEIGHT = 150, LEFT = 50, BOTTOM = 20, TOP = 9;
const plots = new Map();

function nice(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return power * [1, 2, 5, 10].find((each) => each * power >= value * 0.9999);
}

class Plot {
  // `bounds`: of the axis, which goes further where values do; with two bounds it is logarithmic.
  constructor(parent, title, note, text, bounds) {
    Object.assign(this, {title, text, bounds, series: []});
    this.picture = shape("svg", {role: "img", "aria-label": title});
    this.figure = element("figure", {}, element("figcaption", {}, title, element("small", {}, note)), this.picture);
    this.figure.onmousemove = (event) => this.point(event);
    this.figure.onmouseleave = () => unpoint();
    parent.append(this.figure);
  }

  draw() {
    const width = this.picture.clientWidth || 380, end = last(past.times), width_s = span(), start = end - width_s;
    const values = this.series.flatMap((each) => each.values.filter((value, at) => value !== null && past.times[at] >= start));
    const most = values.reduce((a, b) => Math.max(a, b), this.bounds.at(-1));
    const least = values.reduce((a, b) => b > 0 ? Math.min(a, Math.max(b, SHORTEST_S)) : a, this.bounds[0]);
    let share, marks;
    if (this.bounds.length === 2) {
      const low = Math.floor(Math.log10(least * 1.001)), high = Math.ceil(Math.log10(most * 0.999));
      share = (value) => Math.max(0, (Math.log10(value) - low) / (high - low));
      marks = Array.from({length: high - low + 1}, (_, at) => 10 ** (low + at));
    } else {
      const top = nice(most);
      share = (value) => value / top;
      marks = [0, top / 2, top];
    }
    this.x = (time) => LEFT + (time - start) / width_s * (width - LEFT);
    this.y = (value) => HEIGHT - BOTTOM - share(value) * (HEIGHT - BOTTOM - TOP);
    this.picture.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    this.picture.replaceChildren();
    for (const mark of marks) {
      const y = this.y(mark);
      this.add("line", {class: "grid", x1: LEFT, x2: width, y1: y, y2: y});
      this.add("text", {x: LEFT - 7, y: y + 4, "text-anchor": "end"}, mark ? this.text(mark) : "0");
    }
    const step = width_s > 150 ? 60 : width_s > 75 ? 30 : 15;
    for (let ago = 0; ago < width_s * 0.93; ago += step) {
      const words = ago ? step === 60 ? `−${ago / 60} min` : `−${ago} s` : "now";
      this.add("text", {x: this.x(end - ago), y: HEIGHT - 4, "text-anchor": ago ? "middle" : "end"}, words);
    }
    for (const each of this.series) this.line(each, start);
    if (pointedAt !== null) {
      const x = this.x(past.times[nearest(start + pointedAt * width_s)]);
      this.add("line", {class: "cross", x1: x, x2: x, y1: TOP, y2: HEIGHT - BOTTOM});
    }
  }

  line({values, colour, thin, late}, start) {
    let path = "", area = "", open = false;
    values.forEach((value, at) => {
      if (value === null || past.times[at] < start) { open = false; return; }
      const x = this.x(past.times[at]).toFixed(1), y = this.y(value).toFixed(1);
      path += `${open ? "L" : "M"}${x} ${y}`;
      if (value > late) area += `M${x} ${this.y(0)}V${y}`;
      open = true;
    });
    this.add("path", {class: "late", d: area});
    this.add("path", {class: `s${colour}${thin ? " thin" : ""}`, d: path});
  }

  add(tag, attributes, text) { this.picture.append(shape(tag, attributes, text)); }

  point(event) {
    const box = this.picture.getBoundingClientRect();
    const share = (event.clientX - box.left - LEFT) / (box.width - LEFT);
    if (share < 0 || share > 1 || !past.times.length) return unpoint();
    pointedAt = share;
    const at = nearest(last(past.times) - (1 - share) * span());
    const rows = this.series.filter((each) => each.values[at] !== null).map((each) => element("div", {},
      element("span", {}, element("span", {class: `swatch b${each.colour}`}), each.name), element("b", {}, this.text(each.values[at]))));
    $("tip")?.remove();
    const tip = document.body.appendChild(element("div", {id: "tip"}, element("div", {}, clock(past.times[at])), ...rows));
    tip.style.left = `${Math.max(8, Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8))}px`;
    tip.style.top = `${Math.max(8, Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 8))}px`;
    for (const each of plots.values()) each.draw();
  }
}

function unpoint() {
  $("tip")?.remove();
  pointedAt = null;
  for (const each of plots.values()) each.draw();
}

function plot(parent, title, note, text, bounds, series) {
  if (!plots.has(parent + title)) plots.set(parent + title, new Plot($(parent), title, note, text, bounds));
  const found = plots.get(parent + title);
  found.series = series;
  found.draw();
}

// The series of one group: one for each of the busiest paths, in the colour that its path keeps.
function shown(group, total) {
  const paths = Object.keys(past[group]).sort((a, b) => (last(past[group][b][total]) ?? 0) - (last(past[group][a][total]) ?? 0)).slice(0, COLOURS);
  const kept = colours[group];
  for (const path of Object.keys(kept)) if (!paths.includes(path)) delete kept[path];
  for (const path of paths) {
    const taken = Object.values(kept);
    kept[path] ??= [...Array(COLOURS).keys()].find((each) => !taken.includes(each));
  }
  return (values, name = "", thin = false) => paths.map((path) =>
    ({name: dotted(path) + name, values: values(past[group][path]), colour: kept[path], thin})).filter((each) => each.values.some((value) => value !== null));
}

function drawPlots() {
  if (!past.times.length) return;
  if (Object.keys(past.endpoints).length) {
    const of = shown("endpoints", "requests");
    plot("plots", "Requests", "per second", count, [1], of((each) => ended(each, "requests")));
    plot("plots", "Duration", "p99, dashed p50", seconds, [0.001, 0.01], [...of((each) => each.p99_s, " p99"), ...of((each) => each.p50_s, " p50", true)]);
    plot("plots", "Errors", "per second, dashed refused", count, [1], [...of((each) => rates(each.errors), " errors"), ...of((each) => rates(each.refused), " refused", true)]);
    plot("plots", "In flight", "requests", count, [1], of((each) => each.running));
    plot("plots", "Queue", "requests that wait", count, [1], of((each) => each.waiting));
  }
  plot("plots", "Event loop lag", "", seconds, [0.001, 0.1], [{name: "lag", values: past.loop_lag_s, colour: 7, late: LATE_S}]);
  if (Object.keys(past.calls).length) {
    const of = shown("calls", "calls");
    plot("calls-plots", "Calls", "per second", count, [1], of((each) => ended(each, "calls")));
    plot("calls-plots", "Duration of calls", "p99, dashed p50", seconds, [0.001, 0.01], [...of((each) => each.p99_s, " p99"), ...of((each) => each.p50_s, " p50", true)]);
    plot("calls-plots", "Failed calls", "per second, dashed refused", count, [1], [...of((each) => rates(each.errors), " errors"), ...of((each) => rates(each.refused), " refused", true)]);
  }
}

// ---- tables

const cell = (text, style = "") => ({text, style});
const rate = (value, style = "") => value === null ? cell("–", "zero") : cell(count(value), value ? style : "zero");
const time = (value) => value === null || value === undefined ? cell("–", "zero") : cell(seconds(value));
const taken = (value, limit, style = "") => cell(limit ? `${value} / ${limit}` : `${value}`, value ? style : "zero");

function fill(id, titles, rows, names = 1) {
  const text = (at) => at === 0 ? "name" : at < names ? "text" : "";
  $(id).replaceChildren(
    element("thead", {}, element("tr", {}, ...titles.map((each, at) => element("th", {scope: "col", class: text(at)}, each)))),
    element("tbody", {}, ...rows.map((row) => element("tr", {}, ...row.map((each, at) =>
      element("td", {class: `${text(at)} ${each.style}`}, ...(each.colour === undefined ? [] : [element("span", {class: `swatch b${each.colour}`})]), each.text))))));
}

// Whether an endpoint refuses requests because it is at capacity.
const full = (each) => each.state === "serving" && last(rates(past.endpoints[each.name]?.refused)) > 0;

function drawTables() {
  const statistics = now.statistics;
  fill("endpoints-table", ["Endpoint", "State", "Requests/s", "Errors/s", "Refused/s", "In flight", "Queue", "p50", "p99"],
    statistics.endpoints.map((each) => {
      const columns = past.endpoints[each.name] ?? {};
      const waits = each.max_inflight !== null && each.waiting > 0 && each.waiting >= each.max_queue ? "bad" : "";
      return [{...cell(dotted(each.name)), colour: colours.endpoints[each.name] ?? "x"}, !now.loop.turns ? cell("stuck", "bad") : full(each) ? cell("full", "bad") : cell(each.state, each.state === "serving" ? "" : "warn"),
        rate(last(ended(columns, "requests"))), rate(last(rates(columns.errors)), "bad"), rate(last(rates(columns.refused)), "bad"),
        taken(each.running, each.max_inflight), taken(each.waiting, each.max_inflight === null ? null : each.max_queue, waits),
        time(last(columns.p50_s)), time(last(columns.p99_s))];
    }), 2);
  $("endpoints").hidden = !statistics.endpoints.length;
  fill("calls-table", ["Endpoint", "Calls/s", "Errors/s", "Refused/s", "Open", "p50", "p99", "Instances", "Out of rotation", "Ejected"],
    statistics.calls.map((each) => {
      const columns = past.calls[each.name] ?? {}, out = Object.keys(each.out_of_rotation).length;
      return [{...cell(dotted(each.name)), colour: colours.calls[each.name] ?? "x"}, rate(last(ended(columns, "calls"))),
        rate(last(rates(columns.errors)), "bad"), rate(last(rates(columns.refused)), "bad"), taken(each.open), time(last(columns.p50_s)), time(last(columns.p99_s)),
        cell(`${each.instances.length}`, each.instances.length ? "" : "bad"), taken(out, null, "bad"), taken(each.ejected, null, "bad")];
    }));
  fill("instances-table", ["Instance", "Endpoint", "State", "Open streams"], statistics.calls.flatMap((each) => each.instances.map((id) => {
    const probes = each.out_of_rotation[id];
    const state = probes !== undefined ? cell(`lost, ${probes} failed probes`, "bad") : each.candidates.includes(id) ? cell("candidate") : cell("left out", "warn");
    return [cell(id), cell(dotted(each.name)), state, taken(each.load[id] ?? 0)];
  })), 3);
  $("calls").hidden = !statistics.calls.length;
}

function drawFacts() {
  const s = now.statistics, sessions = s.sessions, sum = (name) => sessions.reduce((total, each) => total + each[name], 0);
  const facts = {
    "Sessions": `${sessions.filter((each) => each.role === "accepted").length} accepted, ${sessions.filter((each) => each.role === "dialled").length} dialled`,
    "Open streams": `${sum("streams")}, ${sum("blocked")} wait for their readers`,
    "Traffic": traffic ? `${bytes(traffic[0])}/s in, ${bytes(traffic[1])}/s out` : "–",
    "Output that waits": bytes(sum("queued_bytes")),
    "Memory for clients' data": `${bytes(s.held_bytes)} of ${bytes(s.held_limit_bytes)}`,
    "Threads of handlers": `${s.threads.running} of ${s.threads.limit} run, ${s.threads.waiting} wait`,
    "Stalls of the event loop": s.loop.stalls ? `${s.loop.stalls}, the longest ${seconds(s.loop.longest_s)}` : "none",
    "Discovery": s.discovery.where,
    "Addresses": [...new Set(s.endpoints.flatMap((each) => each.addresses))].join(", ") || "none",
  };
  $("facts").replaceChildren(...Object.entries(facts).map(([name, text]) => element("div", {}, element("dt", {}, name), element("dd", {}, text))));
  $("process").hidden = false;
}

// ---- the state of the whole

function judge() {
  const states = now?.statistics?.endpoints.map((each) => each.state) ?? [];
  if (silent) {
    const words = answeredAt === null ? "There is no answer yet." : `No answer since ${clock(answeredAt / 1000)}: the process has ended, or cannot be reached. The figures below are its last.`;
    return ["bad", "no answer", [words]];
  }
  if (!now.loop.turns) {
    const place = now.loop.place ? [" at ", element("code", {}, now.loop.place)] : [];
    const age = now.age_s === null ? "" : ` The tables are from ${seconds(now.age_s)} ago.`;
    return ["bad", "event loop stuck", [`The event loop has been stuck for ${now.loop.stuck_s.toFixed(1)} s`, ...place, `: this process serves no request meanwhile.${age}`]];
  }
  if (now.statistics.state !== "open") return ["warn", now.statistics.state, []];
  const other = states.find((state) => state !== "serving");
  if (now.statistics.endpoints.some(full)) return ["warn", "full: requests are refused", []];
  return other ? ["warn", other, []] : ["good", states.length ? "serving" : "running, serves nothing", []];
}

function draw() {
  const [look, state, alarm] = judge();
  $("dot").className = `dot ${look}`;
  $("state").textContent = state;
  $("alarm").hidden = !alarm.length;
  $("alarm").replaceChildren(...alarm);
  $("main").className = silent ? "stale" : "";
  if (!now?.statistics) return;
  const name = [...new Set(now.statistics.endpoints.map((each) => dotted(each.name).split(".").slice(0, -1).join(".")))].join(", ");
  $("who").textContent = `${name ? name + " · " : ""}instance ${now.statistics.instance_id}`;
  document.title = `${look === "good" ? "" : "● "}${state} · ${name || "trd"}`;
  $("clock").textContent = clock(answeredAt / 1000);
  drawPlots();
  drawTables();
  drawFacts();
}

// ---- questions

async function ask(path) {
  const response = await fetch(path, {signal: AbortSignal.timeout(PATIENCE_MS), cache: "no-store"});
  if (!response.ok) throw new Error(`${path}: ${response.status}`);
  return response.json();
}

async function look() {
  try {
    const [found, more] = await Promise.all([ask("statistics"), ask(`statistics/history?since=${last(past.times) ?? 0}`)]);
    const former = now?.statistics, s = found.statistics;
    if (former && s && former.instance_id !== s.instance_id) { past = empty(); traffic = null; }  // Another process has the port now.
    else if (former && s && answeredAt !== null && found.loop.turns) {
      const passed = (Date.now() - answeredAt) / 1000;
      traffic = [(s.received_bytes - former.received_bytes) / passed, (s.sent_bytes - former.sent_bytes) / passed];
    }
    now = found;
    answeredAt = Date.now();
    silent = false;
    keep(more);
  } catch {
    silent = true;
  }
  draw();
}

async function run() {
  for (;;) {
    const begun = Date.now();
    await look();
    await new Promise((resume) => setTimeout(resume, Math.max(0, begun + EVERY_MS - Date.now())));
  }
}

addEventListener("resize", draw);
run();
