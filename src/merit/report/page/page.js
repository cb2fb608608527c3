(() => {
  "use strict";
  const save = (name, blob) => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  };

  // ---- tables: sort by a column, save as CSV
  const value = (cell) => (cell.dataset.v ?? cell.textContent).trim();
  const sort = (header) => {
    const table = header.closest("table"), body = table.tBodies[0];
    const column = [...header.parentNode.children].indexOf(header);
    const up = header.getAttribute("aria-sort") !== "ascending";
    for (const other of header.parentNode.children) other.setAttribute("aria-sort", "none");
    header.setAttribute("aria-sort", up ? "ascending" : "descending");
    const keyed = [...body.rows].map((row, i) => {
      const text = value(row.cells[column]);
      return { row, i, text, number: text === "" || text === "–" ? NaN : Number(text) };
    });
    const absent = (k) => k.text === "–" || k.text === "";
    keyed.sort((a, b) => {
      if (absent(a) !== absent(b)) return absent(a) ? 1 : -1;
      const both = !Number.isNaN(a.number) && !Number.isNaN(b.number);
      const order = both ? a.number - b.number : a.text.localeCompare(b.text, "en", { numeric: true });
      return (up ? order : -order) || a.i - b.i;
    });
    body.append(...keyed.map((k) => k.row));
  };
  const quote = (text) => {
    const safe = /^[=+@\t\r]|^-(?![\d.])/.test(text) ? "'" + text : text; // a spreadsheet must not run it
    return /[",\n\r]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
  };
  const csv = (table) => [...table.rows].map((row) => [...row.cells].map((cell) => {
    const sign = cell.tagName === "TD" && cell.classList.contains("number");
    return quote((sign ? value(cell) : cell.textContent).trim());
  }).join(",")).join("\r\n") + "\r\n";

  // ---- figures: save as SVG or PNG, in the colours that are shown
  const KEPT = ["fill", "stroke", "stroke-width", "stroke-dasharray", "stroke-linejoin", "paint-order", "font-size", "font-family", "opacity"];
  const asSvg = (figure) => {
    const background = getComputedStyle(document.body).backgroundColor;
    const canvas = figure.querySelector("canvas");
    if (canvas) {
      const { width, height } = canvas;
      return { width, height, text: `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${width} ${height}" width="${width}" height="${height}"><image width="${width}" height="${height}" href="${canvas.toDataURL("image/png")}"/></svg>` };
    }
    const image = figure.querySelector("img");
    if (image) {
      const text = new TextDecoder().decode(Uint8Array.from(atob(image.src.split(",")[1]), (c) => c.charCodeAt(0)));
      return { width: image.naturalWidth, height: image.naturalHeight, text };
    }
    const svg = figure.querySelector("svg"), copy = svg.cloneNode(true);
    const from = svg.querySelectorAll("*"), to = copy.querySelectorAll("*");
    from.forEach((node, i) => {
      const style = getComputedStyle(node);
      for (const name of KEPT) to[i].style.setProperty(name, style.getPropertyValue(name));
    });
    const [, , width, height] = svg.getAttribute("viewBox").split(" ").map(Number);
    copy.setAttribute("width", width);
    copy.setAttribute("height", height);
    copy.removeAttribute("style");
    const back = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    for (const [name, text] of Object.entries({ width, height, fill: background })) back.setAttribute(name, text);
    copy.insertBefore(back, copy.firstChild);
    return { width, height, text: new XMLSerializer().serializeToString(copy) };
  };
  const saveFigure = (key, kind) => {
    const figure = document.getElementById(key), { width, height, text } = asSvg(figure);
    if (kind === "svg") return save(`${key}.svg`, new Blob([text], { type: "image/svg+xml" }));
    const canvas = figure.querySelector("canvas");
    if (canvas) return canvas.toBlob((blob) => save(`${key}.png`, blob));
    const image = new Image();
    image.onload = () => {
      const target = document.createElement("canvas");
      [target.width, target.height] = [width * 2, height * 2];
      target.getContext("2d").drawImage(image, 0, 0, width * 2, height * 2);
      target.toBlob((blob) => save(`${key}.png`, blob));
    };
    image.src = URL.createObjectURL(new Blob([text], { type: "image/svg+xml" }));
  };
  document.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    if (button.classList.contains("sort")) sort(button.closest("th"));
    else if (button.dataset.csv) {
      const table = document.getElementById(button.dataset.csv);
      save(`${button.dataset.csv}.csv`, new Blob(["\ufeff" + csv(table)], { type: "text/csv;charset=utf-8" }));
    } else if (button.dataset.cells) {
      const text = matrices.get(button.dataset.cells)();
      save(`${button.dataset.cells}.csv`, new Blob(["\ufeff" + text], { type: "text/csv;charset=utf-8" }));
    } else if (button.dataset.figure) saveFigure(button.dataset.figure, button.dataset.kind);
  });

  // ---- heatmaps: a byte per cell; blue above 0, orange below, as in the colour-blind-safe palettes
  const matrices = new Map();
  const paint = (canvas) => {
    const data = JSON.parse(document.getElementById(canvas.dataset.from).textContent);
    const bytes = Uint8Array.from(atob(data.cells), (c) => c.charCodeAt(0)), count = data.names.length;
    const start = (i) => i * count - (i * (i - 1)) / 2;
    const at = (i, j) => (i <= j ? bytes[start(i) + j - i] : bytes[start(j) + i - j]) / 127 - 1;
    const scale = Math.max(1, Math.floor(720 / count));
    canvas.width = canvas.height = count * scale;
    const context = canvas.getContext("2d");
    const colour = (v) => {
      const s = Math.sqrt(Math.min(1, Math.abs(v))), [r, g, b] = v >= 0 ? [0, 90, 160] : [200, 85, 0];
      return [255 + (r - 255) * s, 255 + (g - 255) * s, 255 + (b - 255) * s].map(Math.round);
    };
    const image = context.createImageData(count * scale, count * scale);
    for (let i = 0; i < count; i++) for (let j = 0; j < count; j++) {
      const [r, g, b] = colour(at(i, j));
      for (let y = i * scale; y < (i + 1) * scale; y++) for (let x = j * scale; x < (j + 1) * scale; x++) {
        image.data.set([r, g, b, 255], 4 * (y * count * scale + x));
      }
    }
    context.putImageData(image, 0, 0);
    context.strokeStyle = "#000";
    context.lineWidth = Math.max(1, scale / 8);
    let edge = 0;
    for (const size of data.sizes.slice(0, -1)) {
      edge += size;
      context.beginPath();
      context.moveTo(edge * scale, 0);
      context.lineTo(edge * scale, count * scale);
      context.moveTo(0, edge * scale);
      context.lineTo(count * scale, edge * scale);
      context.stroke();
    }
    const reading = document.getElementById(canvas.getAttribute("aria-describedby")), cell = canvas.nextElementSibling;
    const inside = (k) => Math.min(count - 1, Math.max(0, k));
    let i = 0, j = 0;
    const read = (aloud) => {
      reading.setAttribute("aria-live", aloud ? "polite" : "off");
      reading.textContent = `${data.names[i]} and ${data.names[j]}: ${at(i, j).toFixed(2)}`;
      const part = (k) => `${(100 * k) / count}%`;
      Object.assign(cell.style, { left: part(j), top: part(i), width: part(1), height: part(1) });
    };
    canvas.addEventListener("pointermove", (event) => {
      const box = canvas.getBoundingClientRect();
      j = inside(Math.floor(((event.clientX - box.left) / box.width) * count));
      i = inside(Math.floor(((event.clientY - box.top) / box.height) * count));
      read(false);
    });
    const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1],
      Home: [0, -count], End: [0, count], PageUp: [-10, 0], PageDown: [10, 0] };
    canvas.addEventListener("keydown", (event) => {
      const step = steps[event.key];
      if (!step || event.altKey || event.ctrlKey || event.metaKey) return;
      event.preventDefault();
      [i, j] = [inside(i + step[0]), inside(j + step[1])];
      read(true);
    });
    canvas.addEventListener("focus", () => read(true));
    matrices.set(canvas.closest("figure").id, () => [["", ...data.names], ...data.names.map((name, r) => [name,
      ...data.names.map((_, c) => at(r, c).toFixed(2))])].map((row) => row.map(quote).join(",")).join("\r\n") + "\r\n");
  };
  document.querySelectorAll("canvas.heatmap").forEach(paint);
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((d) => { d.open = true; }));
})();
