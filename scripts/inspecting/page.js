// The page: which rows are listed, what the address says of that, and what a person presses.
// Texts reach the page as text nodes and attributes alone, never as HTML.

const data = JSON.parse(document.getElementById("data").textContent);

const ITEM_HEIGHT = 54; // pixels of a row in the list, as in the style

const SWITCHES = {
  trained: ["supervised", "Text that the loss counts"],
  context: ["unsupervised", "Text that the loss does not count"],
  borders: ["token borders", "Every other token darker"],
  ids: ["ids on hover", "Token ids under the pointer"],
};

const entries = [
  ...data.rows.map((row) => ({ ...row, group: row.side, key: `${row.side}-${row.number}`, name: `${row.side} ${row.number}` })),
  ...data.left_out.map((row, at) => ({ ...row, group: "out", key: `out-${at}`, name: row.reason, supervised: 0 })),
];
const longest = Math.max(1, ...entries.map((entry) => entry.tokens ?? 0));

const state = { q: "", side: "all", order: "place", row: "", length: "", theme: "", off: "" };
let shown = [];
let chosen = -1; // place in `shown`

const byId = (id) => document.getElementById(id);
const number = (value) => value.toLocaleString("en");
const rows = (count) => `${number(count)} ${count === 1 ? "row" : "rows"}`;

function make(tag, className = "", text = "") {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text) element.textContent = text;
  return element;
}

function draw(tag, attributes, text = "") {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text) element.textContent = text;
  return element;
}

// What the address says, and keeps, so that a view can be sent to somebody.

function readAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  for (const name of Object.keys(state)) state[name] = given.get(name) ?? (name === "side" ? "all" : "");
  state.order ||= "place";
}

function writeAddress() {
  const given = new URLSearchParams();
  for (const [name, value] of Object.entries(state)) {
    if (value && value !== { side: "all", order: "place" }[name]) given.set(name, value);
  }
  history.replaceState(null, "", `#${given}`);
}

const isOn = (name) => !state.off.split(",").includes(name);

// Which rows are listed.

function textOf(entry) {
  entry.text ??= entry.pieces ? entry.pieces.map((place) => data.pieces[place][0]).join("") : entry.detail;
  return entry.text;
}

function searched(entry) {
  entry.searched ??= [textOf(entry), entry.origin, entry.reason ?? "", entry.name].join("\n").toLowerCase();
  return entry.searched;
}

function isWithin(entry) {
  if (!state.length) return true;
  const [from, to] = state.length.split("-").map(Number);
  return entry.tokens !== null && entry.tokens >= from && (!to || entry.tokens <= to);
}

function choose() {
  const wanted = state.q.toLowerCase();
  shown = entries.filter(
    (entry) =>
      (state.side === "all" || entry.group === state.side) && isWithin(entry) && (!wanted || searched(entry).includes(wanted)),
  );
  const share = (entry) => (entry.tokens ? entry.supervised / entry.tokens : 2);
  if (state.order === "longest") shown.sort((a, b) => (b.tokens ?? -1) - (a.tokens ?? -1));
  if (state.order === "shortest") shown.sort((a, b) => (a.tokens ?? Infinity) - (b.tokens ?? Infinity));
  if (state.order === "least") shown.sort((a, b) => share(a) - share(b));
  chosen = shown.length ? Math.max(0, shown.findIndex((entry) => entry.key === state.row)) : -1;
  drawList(true);
  drawRow();
}

function move(to) {
  if (!shown.length) return;
  chosen = Math.min(shown.length - 1, Math.max(0, to));
  state.row = shown[chosen].key;
  writeAddress();
  drawList(true);
  drawRow();
}

// The list: only the rows in sight are drawn.

function drawList(follows) {
  const list = byId("list"), items = byId("items");
  items.style.height = `${shown.length * ITEM_HEIGHT}px`;
  const top = chosen * ITEM_HEIGHT;
  if (follows && top < list.scrollTop) list.scrollTop = top;
  if (follows && top + ITEM_HEIGHT > list.scrollTop + list.clientHeight) list.scrollTop = top + ITEM_HEIGHT - list.clientHeight;
  const first = Math.max(0, Math.floor(list.scrollTop / ITEM_HEIGHT) - 4);
  const last = Math.min(shown.length, Math.ceil((list.scrollTop + list.clientHeight) / ITEM_HEIGHT) + 4);
  items.replaceChildren(...shown.slice(first, last).map((entry, at) => item(entry, first + at)));
  if (chosen >= 0) list.setAttribute("aria-activedescendant", `item-${chosen}`);
  byId("count").textContent = shown.length === entries.length ? rows(shown.length) : `${number(shown.length)} of ${rows(entries.length)}`;
}

function item(entry, place) {
  const element = make("div", "item");
  element.id = `item-${place}`;
  element.setAttribute("role", "option");
  element.setAttribute("aria-selected", String(place === chosen));
  element.style.top = `${place * ITEM_HEIGHT}px`;
  const head = make("div"), body = make("div");
  head.append(make("span", entry.group === "out" ? "name out" : "name", entry.name));
  head.append(make("span", "from", entry.origin.split("/").pop()));
  if (entry.tokens !== null) head.append(make("span", "size", number(entry.tokens)));
  body.append(make("span", "start", startOf(entry)));
  element.append(head, body);
  if (entry.pieces) {
    const meter = make("div", "meter"), part = make("i");
    meter.style.width = `calc((100% - 32px) * ${entry.tokens / longest})`;
    part.style.width = `${(100 * entry.supervised) / entry.tokens}%`;
    meter.append(part);
    element.append(meter);
  }
  element.addEventListener("click", () => move(place));
  return element;
}

// What the list shows of a row: where the search found something, or else how the first question begins.
function startOf(entry) {
  if (!entry.pieces) return inOneLine(reasonOf(entry).replace(entry.origin, "").replace(/^[,: ]+/, "").slice(0, 160));
  entry.plain ??= entry.pieces.map((place) => (data.pieces[place][1] === 0 ? data.pieces[place][0] : " ")).join("");
  const found = state.q ? entry.plain.toLowerCase().indexOf(state.q.toLowerCase()) : -1;
  if (found >= 0) return inOneLine((found > 24 ? "…" : "") + entry.plain.slice(Math.max(0, found - 24), found + 120));
  const speaker = entry.turns.findIndex(([, role]) => ["user", "human"].includes(role.toLowerCase()));
  if (speaker < 0) return inOneLine(entry.plain.slice(0, 160));
  const first = entry.turns[speaker][0];
  const head = entry.pieces.slice(first + 1, first + 80).map((place) => data.pieces[place][0]).join("");
  return inOneLine(head.trimStart().replace(/^(user|human)\s+/i, ""));
}

function reasonOf(entry) {
  const over = (entry.tokens ?? 0) - data.max_length;
  const counted = over > 0 ? `${number(over)} tokens more than max_length ${number(data.max_length)}` : "";
  return entry.detail || counted || `a row of ${entry.side}`;
}

const inOneLine = (text) => text.replace(/\s+/g, " ").replace(new RegExp(UNSEEN, "g"), "␦");

// What stands around the rows.

function drawSummary() {
  byId("recipe").textContent = data.recipe;
  for (const [side, told] of Object.entries(data.sides)) {
    const share = Math.round((100 * told.supervised_tokens) / told.tokens);
    const here = data.rows.filter((row) => row.side === side).length;
    const part = make("span");
    part.append(make("b", "", side), ` ${rows(told.rows)}, ${number(told.tokens)} tokens, ${share}% supervised`);
    if (here < told.rows) part.append(`; ${number(here)} of them on this page`);
    byId("sides").append(part);
  }
  byId("sources").replaceChildren(...data.account.map((line) => make("li", "", line)));
}

function pressed(parent, name, text, isPressed, onClick, title = "") {
  const button = make("button", "", text);
  button.type = "button";
  button.dataset.name = name;
  button.title = title;
  button.setAttribute("aria-pressed", String(isPressed));
  button.addEventListener("click", onClick);
  parent.append(button);
}

function drawControls() {
  const groups = byId("groups"), switches = byId("switches"), filters = byId("filters");
  const counts = Object.entries(data.sides).map(([side]) => [side, side, entries.filter((entry) => entry.group === side).length]);
  const leftOut = Object.values(data.reasons).reduce((sum, count) => sum + count, 0);
  groups.replaceChildren();
  for (const [name, text, count] of [["all", "all", null], ...counts, ["out", "left out or cut", leftOut]]) {
    const label = count === null ? text : `${text} ${number(count)}`;
    pressed(groups, name, label, state.side === name, () => change({ side: name }));
  }
  switches.replaceChildren();
  for (const [name, [text, title]] of Object.entries(SWITCHES)) {
    pressed(switches, name, text, isOn(name), () => flip(name), title);
  }
  filters.replaceChildren();
  if (state.length) pressed(filters, "length", `${state.length.replace("-", "–")} tokens ✕`, true, () => change({ length: "" }));
  if (state.side === "out") {
    for (const [reason, count] of Object.entries(data.reasons)) {
      pressed(filters, "reason", `${reason} ${number(count)}`, state.q === reason, () => change({ q: state.q === reason ? "" : reason }));
    }
  }
  if (byId("search").value !== state.q) byId("search").value = state.q;
  byId("order").value = state.order;
  byId("theme").textContent = `Theme: ${state.theme || "auto"}`;
  if (state.theme) document.documentElement.dataset.theme = state.theme;
  else delete document.documentElement.dataset.theme;
}

function flip(name) {
  const off = state.off.split(",").filter((other) => other && other !== name);
  if (isOn(name)) off.push(name);
  change({ off: off.join(",") });
}

function change(values) {
  Object.assign(state, values);
  writeAddress();
  drawControls();
  drawHistogram();
  choose();
}

// What is told under the pointer.

function hideTip() {
  byId("tip").hidden = true;
  document.querySelector(".under")?.classList.remove("under");
}

function tell(event) {
  hideTip();
  const element = event.target.closest("span, rect");
  const isToken = element?.tagName === "SPAN";
  if (!element?.told || (isToken && !isOn("ids"))) return;
  const tip = byId("tip");
  tip.textContent = element.told();
  tip.hidden = false;
  if (isToken) element.classList.add("under");
  const box = tip.getBoundingClientRect();
  const below = event.clientY + 18 + box.height < innerHeight;
  tip.style.left = `${Math.max(4, Math.min(event.clientX + 8, innerWidth - box.width - 4))}px`;
  tip.style.top = `${below ? event.clientY + 18 : event.clientY - box.height - 10}px`;
}

function press(event) {
  const isSearch = event.target === byId("search");
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.tagName === "SELECT") return;
  if (event.key === "Escape") {
    byId("search").blur();
    change({ q: "", length: "" });
    return;
  }
  const steps = { ArrowDown: 1, ArrowUp: -1, ...(isSearch ? {} : { j: 1, k: -1, Home: -Infinity, End: Infinity }) };
  if (event.key in steps) {
    event.preventDefault();
    move(chosen + steps[event.key]);
  } else if (event.key === "/" && !isSearch) {
    event.preventDefault();
    byId("search").focus();
    byId("search").select();
  }
}

function start() {
  readAddress();
  drawSummary();
  drawControls();
  drawHistogram();
  choose();
  byId("search").addEventListener("input", (event) => change({ q: event.target.value }));
  byId("order").addEventListener("change", (event) => change({ order: event.target.value }));
  byId("theme").addEventListener("click", () => change({ theme: { "": "light", light: "dark", dark: "" }[state.theme] ?? "" }));
  byId("list").addEventListener("scroll", () => drawList(false));
  byId("row").addEventListener("pointerover", tell);
  byId("row").addEventListener("pointerleave", hideTip);
  byId("histogram").addEventListener("pointermove", tell);
  byId("histogram").addEventListener("pointerleave", hideTip);
  document.addEventListener("keydown", press);
  addEventListener("hashchange", () => {
    readAddress();
    drawControls();
    drawHistogram();
    choose();
  });
  addEventListener("resize", () => {
    drawHistogram();
    drawList(false);
  });
}

start();
