"""Talking to a model: one question, a terminal, an OpenAI-compatible endpoint, a page.

engine.py holds the model and answers a conversation; everything else asks it. opening.py opens it,
in several processes if need be. command.py is the command line, session.py what it starts.
"""

from typing import TYPE_CHECKING

from sparselong.lazy import expose

if TYPE_CHECKING:
    from sparselong.chat.command import (
        TOKEN_VARIABLE,
        add_options,
        check_options,
        check_processes,
        plan_chat,
        rank_arguments,
        show,
    )
    from sparselong.chat.session import chat
    from sparselong.chat.sources import reads_of

__getattr__ = expose(__name__)
