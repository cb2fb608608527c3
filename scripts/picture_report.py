"""Take the picture of a report for the README, in the system's Chromium.

    python scripts/picture_report.py runs/demo/report.html docs/report.png      # needs the extra `browser`

The picture is the top of the page without its small print, with the first two figures side by side: verdict, table of
models, what conflicts with what.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

WIDTH, HEIGHT = 1080, 1385


def main(page: Path, picture: Path) -> None:
    """Write the picture."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        tab = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme="light")
        tab.goto(page.resolve().as_uri())
        tab.add_style_tag(
            content="#verdict details,#verdict .small,#verdict .table+.table,.tools,.reading{display:none}"
        )
        tab.add_style_tag(content="#verdict .small~.table,#conflict>p,#conflict details{display:none}")
        tab.add_style_tag(content="#conflict{display:flex;flex-wrap:wrap;gap:0 24px}#conflict h2{flex:0 0 100%}")
        tab.add_style_tag(content="#conflict figure{flex:1 1 45%;margin-top:0}.chart{min-width:0!important}")
        tab.screenshot(path=picture)
        browser.close()
    print(picture)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
