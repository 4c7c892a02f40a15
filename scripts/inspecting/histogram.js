// The histogram of rows by length, in which a bar can be chosen.

function drawHistogram() {
  const box = byId("histogram"), { width: step, kept, left_out: out, open } = data.histogram;
  const width = Math.max(280, box.clientWidth), height = 96, left = 40, right = 10, top = 14, bottom = 20;
  const most = Math.max(1, ...kept.map((count, bar) => count + out[bar]));
  const x = (tokens) => left + ((width - left - right) * tokens) / (step * kept.length);
  const y = (count) => height - bottom - ((height - bottom - top) * count) / most;
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": "Rows by length in tokens" });
  kept.forEach((count, bar) => {
    const size = { x: x(bar * step) + 0.5, width: Math.max(1, x(step) - x(0) - 1) };
    // A single row is seen too, whatever the tallest bar.
    const tall = (rowsOfBar) => (rowsOfBar ? Math.max(1.5, y(0) - y(rowsOfBar)) : 0);
    const trainedTop = y(0) - tall(count);
    if (count) svg.append(draw("rect", { class: "bar", ...size, y: trainedTop, height: tall(count) }));
    if (out[bar]) svg.append(draw("rect", { class: "out", ...size, y: trainedTop - tall(out[bar]), height: tall(out[bar]) }));
  });
  svg.append(draw("line", { class: "axis", x1: left, x2: width - right, y1: y(0) + 0.5, y2: y(0) + 0.5 }));
  svg.append(draw("text", { x: left - 6, y: y(most) + 4, "text-anchor": "end" }, number(most)));
  svg.append(draw("text", { x: left - 6, y: y(0) + 1, "text-anchor": "end" }, "0"));
  drawTicks(svg, x, height, (width - left - right) / 80, step * kept.length);
  drawLimit(svg, x, width - right, y(0));
  kept.forEach((count, bar) => svg.append(hitOf(bar, { x: x(bar * step), width: x(step) - x(0), y: top, height: height - top })));
  box.replaceChildren(svg);
  byId("legend").replaceChildren(make("span", "", "in the data"));
  if (out.some(Boolean)) byId("legend").append(make("span", "out", "left out"));

  function hitOf(bar, place) {
    const from = bar * step, isLast = open && bar === kept.length - 1, to = isLast ? 0 : from + step - 1;
    const told = `${number(from)}${to ? (to > from ? `–${number(to)}` : "") : " or more"} tokens: ${rows(kept[bar])}`;
    const length = `${from}-${to || ""}`;
    const hit = draw("rect", { class: state.length === length ? "hit chosen" : "hit", ...place });
    hit.told = () => told + (out[bar] ? `, and ${number(out[bar])} left out` : "");
    hit.append(draw("title", {}, hit.told()));
    hit.addEventListener("click", () => change({ length: state.length === length ? "" : length }));
    return hit;
  }
}

function drawTicks(svg, x, height, about, end) {
  const rough = end / Math.max(1, about), power = 10 ** Math.floor(Math.log10(rough));
  const step = Math.max(1, [1, 2, 5, 10].map((unit) => unit * power).find((size) => size >= rough));
  for (let tokens = 0; tokens <= end; tokens += step) {
    const anchor = tokens + step > end && x(end) - x(tokens) < 20 ? "end" : "middle";
    svg.append(draw("text", { x: x(tokens), y: height - 6, "text-anchor": anchor }, number(tokens)));
  }
}

function drawLimit(svg, x, right, floor) {
  const at = x(data.max_length), label = `max_length ${number(data.max_length)}`;
  if (at > right + 1) {
    svg.append(draw("text", { class: "limit", x: right, y: 11, "text-anchor": "end" }, `${label} →`));
    return;
  }
  svg.append(draw("line", { class: "limit", x1: at, x2: at, y1: 2, y2: floor }));
  const toLeft = at > right / 2;
  svg.append(draw("text", { class: "limit", x: at + (toLeft ? -5 : 5), y: 11, "text-anchor": toLeft ? "end" : "start" }, label));
}
