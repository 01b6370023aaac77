"""An OpenAI-compatible endpoint on one model, and a page on it."""

from typing import TYPE_CHECKING

from sparselong.lazy import expose

if TYPE_CHECKING:
    from sparselong.chat.server.app import make_app
    from sparselong.chat.server.listen import bind, serve
    from sparselong.chat.server.pages import add_page

__getattr__ = expose(__name__)
