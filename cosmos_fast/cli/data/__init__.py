"""`cosmos-fast data`: a group of its own, one file a sub-command."""

from cosmos_fast.cli.lazy import LazyGroup

command = LazyGroup(
    "data",
    package="cosmos_fast.cli.data",
    summaries={
        "synth": "Generate scenes with captions and masks as shards.",
        "index": "Index shards, so that training can read any sample.",
        "inspect": "Count, check and show the samples of shards.",
        "coverage": "Say what ranks and workers will see of an epoch and a run.",
        "verify": "Decode every sample; put the bad ones into quarantine.",
        "prepare": "Turn downloaded data sets into shards.",
    },
    help="Make, index and inspect shards.",
)
