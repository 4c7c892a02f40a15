"use strict";
// One row: its turns, and in them its pieces with marks.

const SPECIAL = 1, BYTES = 2; // kinds of a piece; 0 is text
const PIECES_AT_ONCE = 6000; // a longer row is drawn in steps
const UNSEEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff]/;

function drawRow(limit = PIECES_AT_ONCE) {
  const place = byId("row");
  place.className = isOn("borders") ? "borders" : "";
  place.scrollTop = limit > PIECES_AT_ONCE ? place.scrollTop : 0;
  hideTip();
  if (chosen < 0) {
    place.replaceChildren(make("p", "nothing", entries.length ? "No row has that." : "No row is on this page."));
    return;
  }
  const entry = shown[chosen];
  const facts = [entry.origin];
  if (entry.pieces) {
    const share = Math.round((100 * entry.supervised) / entry.tokens);
    facts.push(`${number(entry.tokens)} tokens`, `${number(entry.supervised)} supervised (${share}%)`);
  } else if (entry.tokens !== null) {
    facts.push(`${number(entry.tokens)} tokens`);
  }
  const title = entry.pieces ? `${entry.side} row ${entry.number}` : `${entry.side} row: ${entry.reason}`;
  place.replaceChildren(make("h2", "", title), make("p", "facts", facts.join(" · ")));
  if (!entry.pieces) {
    place.append(make("p", "reason", reasonOf(entry)));
    return;
  }
  place.append(...turnsOf(entry, limit));
  if (entry.pieces.length > limit) {
    const more = make("button", "more", `Show more of ${number(entry.pieces.length)} pieces`);
    more.addEventListener("click", () => drawRow(limit + PIECES_AT_ONCE));
    place.append(more);
  }
  markFound(place);
}

function turnsOf(entry, limit) {
  const trained = entry.runs.flatMap((length, run) => Array(length).fill(run % 2 === 1));
  const end = Math.min(limit, entry.pieces.length);
  const starts = entry.turns[0]?.[0] === 0 ? entry.turns : [[0, ""], ...entry.turns];
  const elements = [];
  let token = 0;
  starts.forEach(([first, role], turn) => {
    const last = Math.min(end, starts[turn + 1]?.[0] ?? end);
    if (first >= last) return;
    const hasTrained = trained.slice(first, last).includes(true);
    const element = make("section", "turn"), text = make("div", "text");
    element.append(make("h3", hasTrained ? "trained" : "", role), text);
    for (let at = first; at < last; at += 1) {
      const [, , ids] = data.pieces[entry.pieces[at]];
      if (isOn(trained[at] ? "trained" : "context")) {
        text.append(pieceOf(entry, at, trained, token));
      } else {
        hide(text, ids.length);
      }
      token += ids.length;
    }
    elements.push(element);
  });
  return elements;
}

function hide(text, tokens) {
  let run = text.lastChild;
  if (!run?.classList.contains("hidden-run")) {
    run = make("span", "hidden-run");
    run.tokens = 0;
    text.append(run);
  }
  run.tokens += tokens;
  run.textContent = ` ⋯ ${number(run.tokens)} ${run.tokens === 1 ? "token" : "tokens"} `;
}

function pieceOf(entry, at, trained, token) {
  const [text, kind, ids] = data.pieces[entry.pieces[at]];
  const names = [at % 2 ? "odd" : "", trained[at] ? "trained-text" : "", ["", "special", "bytes"][kind]];
  const element = make("span", names.filter(Boolean).join(" "));
  const beside = (step) => {
    const other = data.pieces[entry.pieces[at + step]];
    return other && other[1] === kind && trained[at + step] === trained[at] ? other[0] : "";
  };
  appendText(element, text, beside(-1).slice(-1), beside(1).slice(0, 1));
  element.told = () => {
    const which = ids.length === 1 ? `id ${ids[0]}` : `ids ${ids.join(" ")}`;
    const where = `token ${number(token + 1)} of ${number(entry.tokens)}, ${trained[at] ? "supervised" : "not supervised"}`;
    const note = { [SPECIAL]: "\nspecial token", [BYTES]: "\nbytes that are no whole character" }[kind] ?? "";
    return `${which}   ${kind ? text : JSON.stringify(text)}\n${where}${note}`;
  };
  return element;
}

// White space is marked where it would not be seen: each line feed and tab, and a space without a word on both sides.
function appendText(element, text, before, after) {
  const blank = (character) => !character || /\s/.test(character);
  let plain = "";
  const flush = () => {
    if (plain) element.append(plain);
    plain = "";
  };
  for (let at = 0; at < text.length; at += 1) {
    const character = text[at];
    const unseen = UNSEEN.test(character);
    const alone = character === " " && (blank(text[at - 1] ?? before) || blank(text[at + 1] ?? after));
    if (!alone && !unseen && character !== "\n" && character !== "\t") {
      plain += character;
      continue;
    }
    flush();
    const mark = make("i", alone ? "space" : "mark", unseen ? "" : character);
    if (unseen) mark.dataset.mark = `U+${character.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}`;
    else if (!alone) mark.dataset.mark = character === "\n" ? "↵" : "⇥";
    element.append(mark);
  }
  flush();
}

function markFound(place) {
  if (!("highlights" in CSS)) return;
  CSS.highlights.clear();
  if (!state.q) return;
  const nodes = [], walker = document.createTreeWalker(place, NodeFilter.SHOW_TEXT);
  let text = "";
  while (walker.nextNode()) {
    nodes.push([text.length, walker.currentNode]);
    text += walker.currentNode.data;
  }
  const lower = text.toLowerCase(), wanted = state.q.toLowerCase(), ranges = [];
  if (lower.length !== text.length) return;
  let left = 0;
  const spot = (at, isEnd) => {
    while (left + 1 < nodes.length && nodes[left + 1][0] + (isEnd ? 1 : 0) <= at) left += 1;
    return [nodes[left][1], at - nodes[left][0]];
  };
  for (let at = lower.indexOf(wanted); at >= 0; at = lower.indexOf(wanted, at + wanted.length)) {
    const range = new Range();
    range.setStart(...spot(at, false));
    range.setEnd(...spot(at + wanted.length, true));
    ranges.push(range);
  }
  CSS.highlights.set("found", new Highlight(...ranges));
  const first = ranges[0]?.startContainer.parentElement;
  if (first && place.scrollHeight > place.clientHeight) first.scrollIntoView({ block: "nearest" });
}
