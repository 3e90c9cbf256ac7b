"""One self-contained HTML page: nothing is fetched, and everything but the tooltip works without scripts."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.figure import Figure
from PIL import Image

MAP_SIDE = 640  # px of the map


@dataclass(frozen=True)
class MapPoint:
    """An image on the map of embeddings."""

    x: float  # 0 .. 1
    y: float  # 0 .. 1
    name: str
    label: str  # "" where there is none
    colour: str
    thumbnail: str  # data URI


def png_uri(figure: Figure, dpi: int = 100) -> str:
    """A figure as a data URI."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=dpi)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def thumbnail_uri(pixels: UInt8[np.ndarray, "h w 3"], side: int) -> str:
    """An image as a small JPEG in a data URI; its longer side has at most ``side`` pixels."""
    image = Image.fromarray(pixels)
    image.thumbnail((side, side))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def image(uri: str, alt: str) -> str:
    """An ``img`` element."""
    return f'<img src="{uri}" alt="{escape(alt)}">'


def table(head: Sequence[str], rows: Sequence[Sequence[Any]], numbers: bool = False) -> str:
    """A table; every cell is escaped."""
    kind = ' class="numbers"' if numbers else ""
    top = "".join(f"<th>{escape(str(cell))}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class=wide><table{kind}><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"


def section(title: str, *parts: str) -> str:
    """A section with its heading."""
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>"


def details(summary: str, content: str) -> str:
    """Something folded away; it opens without scripts."""
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def paragraph(text: str) -> str:
    """A paragraph, escaped."""
    return f"<p>{escape(text)}</p>"


def commands(lines: Sequence[str]) -> str:
    """Commands to copy."""
    return f"<pre>{escape(chr(10).join(lines))}</pre>"


def embedding_map(number: int, points: Sequence[MapPoint]) -> str:
    """A scatter plot as SVG; a script shows the nearest point's image, and without it a point's name is its title."""
    dots = "".join(
        f'<circle cx="{MAP_SIDE * p.x:.1f}" cy="{MAP_SIDE * p.y:.1f}" r="4" fill="{p.colour}" data-i="{i}">'
        f"<title>{escape(p.name)}{escape(f' ({p.label})' if p.label else '')}</title></circle>"
        for i, p in enumerate(points)
    )
    data = json.dumps([[p.thumbnail, p.name, p.label] for p in points]).replace("<", "\\u003c")
    return (
        f'<div class="map" id="map{number}"><svg viewBox="-8 -8 {MAP_SIDE + 16} {MAP_SIDE + 16}" role="img" '
        f'aria-label="map of embeddings">{dots}</svg><div class="tip" hidden><img alt=""><span></span></div>'
        f'<script type="application/json">{data}</script></div>'
    )


def scaled(positions: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, "n 2"]:
    """Positions moved and scaled into 0 .. 1; outliers beyond the 1st and 99th percentile come to the edge."""
    low, high = np.percentile(positions, [1, 99], axis=0)
    return np.clip((positions - low) / np.maximum(high - low, 1e-9), 0, 1)


def page(title: str, sections: Sequence[str]) -> str:
    """The whole document."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width, initial-scale=1"><link rel="icon" href="data:,"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body><main><h1>{escape(title)}</h1>{''.join(sections)}</main>"
        f"<script>{_SCRIPT}</script></body></html>"
    )


_STYLE = """
:root{color-scheme:light dark;--ink:#22313f;--quiet:#66717c;--line:#d9dee3;--paper:#fff}
@media(prefers-color-scheme:dark){:root{--ink:#e6eaee;--quiet:#9aa5b0;--line:#3a4550;--paper:#161c22}
section img{background:#fff}}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:1100px;margin:0 auto;padding:24px}
h1{font-size:24px}h2{font-size:18px;border-top:1px solid var(--line);padding-top:18px;margin-top:30px}
p,summary{color:var(--quiet)}summary{cursor:pointer}
img{max-width:100%;height:auto}
pre{background:rgba(128,128,128,.12);padding:12px;overflow-x:auto;border-radius:6px}
table{border-collapse:collapse;font-size:13px}
td,th{text-align:left;padding:3px 12px 3px 0;border-bottom:1px solid var(--line)}
.numbers td{text-align:right;font-variant-numeric:tabular-nums}
.wide{overflow-x:auto}
.map{position:relative;max-width:660px}.map svg{width:100%;border:1px solid var(--line);border-radius:6px}
.map circle{fill-opacity:.75}.map circle.on{stroke:var(--ink);stroke-width:2}
.tip{position:absolute;pointer-events:none;background:var(--paper);border:1px solid var(--line);
border-radius:6px;padding:6px;font-size:12px;max-width:180px;overflow-wrap:anywhere}
.tip img{display:block;width:96px;image-rendering:pixelated}
"""

_SCRIPT = """
for (const map of document.querySelectorAll('.map')) {
  const data = JSON.parse(map.querySelector('script').textContent);
  const tip = map.querySelector('.tip'), svg = map.querySelector('svg');
  const dots = [...svg.querySelectorAll('circle')];
  let on = null;
  svg.addEventListener('pointermove', event => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    let best = null, least = 15 * 15;
    for (const dot of dots) {
      const dx = dot.cx.baseVal.value - at.x, dy = dot.cy.baseVal.value - at.y, far = dx * dx + dy * dy;
      if (far < least) { least = far; best = dot; }
    }
    if (on) on.classList.remove('on');
    on = best;
    tip.hidden = !best;
    if (!best) return;
    best.classList.add('on');
    const [thumbnail, name, label] = data[best.dataset.i];
    tip.querySelector('img').src = thumbnail;
    tip.querySelector('span').textContent = label ? `${name} (${label})` : name;
    const box = map.getBoundingClientRect();
    tip.style.left = `${Math.min(event.clientX - box.left + 14, box.width - 190)}px`;
    tip.style.top = `${event.clientY - box.top + 14}px`;
  });
  svg.addEventListener('pointerleave', () => { tip.hidden = true; if (on) on.classList.remove('on'); on = null; });
}
"""
