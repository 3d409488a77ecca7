#!/usr/bin/env python3
"""Opens reports of `mlnt report` in headless Chromium and checks that they render alone.

    python3 scripts/check_report.py runs/NAME/report.html [--screenshot docs/report.png]

The page is read with html.parser first: no scripts, no addresses of anything outside it, every element closed. Chromium
then renders it at 1280 and at 400 pixels; checked are: nothing on its console, no request to a network, every plot
drawn with a size, and nothing wider than the window but tables that scroll by themselves. Needs Python 3.9 or later.
Without Chromium on the machine only the first part runs, and the script says so.
"""

import argparse
import html.parser
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

VOID = {"meta", "br", "hr", "img", "input", "link"}
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")

# Runs in a page that shows the report in a frame as wide as a phone or a desk: what it measures becomes the title.
MEASURE = """<!DOCTYPE html><title>waiting</title><body style="margin:0">
<iframe src="%s" style="width:%dpx;height:3000px;border:0"></iframe>
<script>
document.querySelector("iframe").onload = (event) => {
  const page = event.target.contentDocument, view = event.target.contentWindow;
  const shown = [...page.querySelectorAll("svg")].map((svg) => svg.getBoundingClientRect())
    .filter((box) => box.width > 0).map((box) => [Math.round(box.width), Math.round(box.height)]);
  const wide = [...page.querySelectorAll("body *")]
    .filter((e) => !e.closest(".scroll *") && !e.closest("svg *"))
    .filter((e) => e.getBoundingClientRect().right > view.innerWidth + 1).map((e) => e.outerHTML.slice(0, 80));
  const loaded = view.performance.getEntriesByType("resource").map((entry) => entry.name);
  document.title = "measured";
  document.body.innerHTML = "";
  const pre = document.createElement("pre");
  pre.textContent = JSON.stringify({shown, wide, loaded, scripts: page.scripts.length});
  document.body.append(pre);
};
</script>"""


class Reader(html.parser.HTMLParser):
    """Counts plots and notes what a page that stands alone must not have."""

    def __init__(self):
        super().__init__()
        self.open, self.faults, self.plots = [], [], 0

    def handle_starttag(self, tag, attrs):
        self.plots += tag == "svg"
        if tag in ("script", "link", "img", "iframe", "object", "embed", "image", "use", "base"):
            self.faults.append(f"line {self.getpos()[0]}: element {tag}")
        for name, value in attrs:
            outside = name in ("src", "srcset", "action", "xlink:href") or (name == "href" and not (value or "").startswith("#"))
            if outside or name.startswith("on") or "url(" in (value or ""):
                self.faults.append(f"line {self.getpos()[0]}: {tag} {name}={value!r}")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"line {self.getpos()[0]}: </{tag}> closes another element")


def read(path):
    reader = Reader()
    text = path.read_text(encoding="utf-8")
    reader.feed(text)
    reader.close()
    faults = reader.faults + [f"{tag} is not closed" for tag in reader.open]
    style = re.search(r"<style>(.*?)</style>", text, re.S)
    if style and re.search(r"url\(|@import", style.group(1)):
        faults.append("the style sheet loads something")
    if not reader.plots:
        faults.append("no plot")
    return faults, reader.plots


def chromium(browser, profile, size, page, *flags):
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--allow-file-access-from-files",
               "--enable-logging=stderr", "--v=0", "--no-first-run", "--disable-background-networking",
               "--disable-component-update", f"--user-data-dir={profile}", f"--window-size={size}", *flags, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def render(browser, path, width):
    """What is wrong with the page in a window of `width` pixels, and how many plots it shows."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        frame, log = folder / "frame.html", folder / "net.json"
        frame.write_text(MEASURE % (path.resolve().as_uri(), width), encoding="utf-8")
        done = chromium(browser, folder / "profile", "1400,3000", frame, f"--log-net-log={log}", "--virtual-time-budget=5000", "--dump-dom")
        found = re.search(r"<pre>(.*?)</pre>", done.stdout, re.S)
        if not found:
            return [f"{width} px: Chromium did not render the page: {done.stderr[-500:]}"], 0
        measured = json.loads(html.unescape(found.group(1)))
        faults = [f"console: {line}" for line in done.stderr.splitlines() if "CONSOLE" in line]
        faults += [f"loads {name}" for name in measured["loaded"]] + [f"wider than the window: {e}" for e in measured["wide"]]
        faults += ["a plot without a size" for size in measured["shown"] if min(size) < 100]
        if measured["scripts"]:
            faults.append(f"{measured['scripts']} scripts")
        # Every request of the whole browser; those of its own to its maker are not the page's.
        for url in set(re.findall(r'"url":"((?:https?|wss?):[^"]*)"', log.read_text(errors="replace"))):
            if not re.search(r"//[^/]*(google|gstatic|gvt1)[^/]*/", url):
                faults.append(f"network request: {url}")
        return [f"{width} px: {fault}" for fault in faults], len(measured["shown"])


def main():
    parser = argparse.ArgumentParser(description="Checks that reports render alone.")
    parser.add_argument("page", type=Path, nargs="+", help="HTML file of mlnt report")
    parser.add_argument("--screenshot", type=Path, metavar="FILE.png", help="picture of the first page's top, 1280 px wide")
    args = parser.parse_args()
    browser = next(filter(None, map(shutil.which, NAMES)), None)
    bad = False
    for page in args.page:
        faults, plots = read(page)
        shown = []
        if browser:
            for width in (1280, 400):
                more, count = render(browser, page, width)
                faults += more
                shown.append(f"{count} shown at {width} px")
        bad |= bool(faults)
        print(f"{page}: {'; '.join(faults) or 'sound'}; {', '.join([f'{plots} plots'] + shown)}")
    if not browser:
        print("no Chromium on this machine: the pages were read, not rendered (on Debian: apt-get install chromium)")
    elif args.screenshot:
        with tempfile.TemporaryDirectory() as folder:
            chromium(browser, folder, "1280,2050", args.page[0].resolve(), f"--screenshot={args.screenshot.resolve()}")
        print(f"{args.screenshot}: {args.screenshot.stat().st_size / 1000:.0f} kB")
    sys.exit(bad)


if __name__ == "__main__":
    main()
