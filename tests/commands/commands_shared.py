"""The embedded model and the local files that tests of the console command use."""

from __future__ import annotations

from documents import ROOT

MODEL = str(ROOT / "resources" / "olmoe-nano")
FILES = ROOT / "tests" / "data_files"
