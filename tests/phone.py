"""A page on a phone: how far it scrolls sideways in chromium."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

WIDTH = 360  # CSS pixels of a common phone

needs_chromium = pytest.mark.skipif(
    shutil.which("chromium") is None, reason="needs chromium (apt-get install chromium)"
)

_MEASURE = """<script>addEventListener("load", () => {
  const root = document.documentElement;
  parent.postMessage([root.clientWidth, root.scrollWidth], "*");
});</script></body>"""
_FRAME = """<iframe src="page.html" width="{width}" height="800" style="border: 0"></iframe><p id="said"></p>
<script>addEventListener("message", event => {{
  document.getElementById("said").textContent = JSON.stringify(event.data);
}});</script>"""


def sideways(page: str, folder: Path, width: int = WIDTH) -> int:
    """By how many pixels `page` is wider than a window of `width`; chromium's own windows cannot be that narrow."""
    folder.mkdir(parents=True, exist_ok=True)
    assert page.count("</body>") == 1
    (folder / "page.html").write_text(page.replace("</body>", _MEASURE), encoding="utf-8")
    (folder / "frame.html").write_text(_FRAME.format(width=width), encoding="utf-8")
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom", "--virtual-time-budget=5000"]
    options += [f"--user-data-dir={folder / 'profile'}", (folder / "frame.html").as_uri()]
    done = subprocess.run(["chromium", *options], capture_output=True, text=True, timeout=120)
    said = re.search(r'id="said">(.+?)</p>', done.stdout)
    assert said, done.stderr
    inside, whole = json.loads(html.unescape(said.group(1)))
    assert width - 20 <= inside <= width  # less a scroll bar
    return int(whole - inside)
