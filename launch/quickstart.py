"""The quickstart: tune a prompt on two sharded workers, then let it grade three sentences it has never seen.

python launch/quickstart.py [key=value ...]
"""

import sys
import time
from pathlib import Path

from peftscale import configio, driver, report, selection

RUN_FILE = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
SENTENCES = (
    "I walked out halfway through, it was the worst evening I have spent in a cinema.",
    "Pleasant enough, with a few nice jokes and a likeable cast.",
    "An absolute masterpiece that I will remember for the rest of my life.",
)

if __name__ == "__main__":
    changes = [f"name=quickstart-{time.strftime('%Y%m%d-%H%M%S')}", *sys.argv[1:]]
    cfg = configio.load(RUN_FILE, changes)
    report.show(report.summary_table(driver.run(cfg)))
    alone = configio.load(RUN_FILE, [*changes, "cluster.workers=0", "base.sharding=replicated"])
    rows = [{"text": sentence} for sentence in SENTENCES]
    report.show(report.answers_table(rows, driver.generate(alone, selection.adapter_dirs(alone, None), rows)))
