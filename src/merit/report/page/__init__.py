"""A run or a study as one HTML file: no network, no library, every figure and table to take away.

::

    data.py        what a run folder holds, read once into typed results; a missing stage is None
    markup.py      escaped HTML, tables that sort and save, figures that save
    charts.py      lines, points and bars as SVG; heatmap.py cells on a canvas
    <section>.py   one section each: data in, markup out
    document.py    the sections in order, with style.css and page.js
"""

from merit.report.page.document import write_page

__all__ = ["write_page"]
