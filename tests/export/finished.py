"""The manifest that a finished export would have, without the export."""

import json
from pathlib import Path

from sparselong.run.manifests import FORMAT_VERSION


def write_finished(run_dir: Path, part: str, **changes: object) -> None:
    """Write a part's manifest, with these keys changed."""
    document = {
        **{"format_version": FORMAT_VERSION, "stage": "05_export", "status": "done"},
        **{"config_hash": "0", "seconds": 1.0, "metrics": {}, "inputs": [], "outputs": []},
        **{"part": part, "options": {"from": "finetuned"}},
        **changes,
    }
    folder = run_dir / "05_export" / part
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps(document))
