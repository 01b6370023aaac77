"""Text and chat data for training, calibration, evaluation and chat. Imports no torch."""

from typing import TYPE_CHECKING

from sparselong.lazy import expose

if TYPE_CHECKING:
    from sparselong.data import conversations, corpus, demo
    from sparselong.data.demo import write_hellaswag
    from sparselong.data.encoding import (
        Encoded,
        EncodedFiles,
        Usable,
        describe_lengths,
        encode_files,
        select_usable,
    )
    from sparselong.data.harmony import Delta, Message, Parser, read_marks
    from sparselong.data.overlap import REPEATED, describe_item, warn_before_training, warn_of_items
    from sparselong.data.prompt import check_chats, render_prompt
    from sparselong.data.rows import EFFORTS
    from sparselong.data.ruler import answer_tokens, check_ruler, make_items, score_answer
    from sparselong.data.run_date import rendering_date
    from sparselong.data.sources import explain_hub_failures
    from sparselong.data.tasks import DEMO_TASK, check_definition, check_tasks

__getattr__ = expose(__name__)
