"""Uploading exports to the Hugging Face Hub with a model card.

form.py is the format `hub` of stage 05: it finds the exports and checks that they are those of this
run. card.py makes the model card from manifests, loading.py says how each form is opened, and
repository.py uploads the files and compares what the hub has with them.
"""

from typing import TYPE_CHECKING

from sparselong.lazy import expose

if TYPE_CHECKING:
    from sparselong.export.hub.form import (
        HUB,
        REPO,
        HubFormat,
        compare_earlier,
        list_finished,
        plan_upload,
    )

__getattr__ = expose(__name__)
