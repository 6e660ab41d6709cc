"""Boilerplate of a page: navigation, advertisements, dialogs, hidden elements, rows and lists of links."""

from __future__ import annotations

import re
from functools import lru_cache

_PLACE = (
    "main site page global top bottom left right header footer head foot mobile desktop primary secondary sub sticky wp l m "
    "c p js mw vector block post entry article user google wide full side inner outer my the nav menu brand"
)
_THING = (
    "nav navbar navigation navigations menu menus submenu dropdown dropdowns breadcrumb breadcrumbs crumbs sidebar sidebars "
    "footer copyright cookie cookies consent gdpr ad ads advert adverts advertisement advertisements adsense sponsor "
    "sponsored sponsors promo promoted promotion banner donate donation popup modal lightbox overlay share sharing sharedaddy "
    "addtoany social newsletter subscribe subscription login signin signup register pagination pager prevnext skip skiplink "
    "skipnav site-header jump searchbox searchbar searchform search related recommended recommendations trending toolbar editsection "
    "headerlink permalink anchorlink noprint catlinks navbox printfooter feedback masthead"
)
_PART = (
    "container containers wrapper wrap menu bar bars box boxes list lists links link inner content contents section area "
    "nav items item button buttons btn btns icon icons block widget widgets form panel row column col holder outer group "
    "main top bottom left right posts post articles article title toggle notice message text path header footer"
)


def _any(words: str) -> str:
    return "|".join(words.split())


_NAMED = re.compile(
    rf"(?:^|[\s\"'])(?:(?:{_any(_PLACE)})[_-]*)*(?:{_any(_THING)})(?:[_-]*(?:{_any(_THING)}|{_any(_PART)}))*(?=[\s\"']|$)"
)
_HIDDEN = re.compile(
    r"\s(?:hidden\b(?!\s*=\s*[\"']?(?:false|until))|aria-hidden\s*=\s*[\"']?true|role\s*=\s*[\"']?(?:navigation|search|menu"
    r"|menubar|banner|contentinfo|complementary|dialog|alertdialog|alert|tooltip|toolbar|tablist)\b"
    r"|style\s*=\s*[\"']?[^\"'>]*(?:display\s*:\s*none|visibility\s*:\s*hidden)"
    r"|class\s*=\s*[\"']?(?:[\w-]+\s+)*(?:(?:is|visually|u)-?)?(?:hidden|display-none|d-none|invisible|sr-only|screen-reader-text|nocontent)\b)"
)
_NAMES = re.compile(r"""\s(?:class|id)\s*=\s*("[^"]*"|'[^']*'|\S+)""")
OUTSIDE = frozenset({"nav", "aside", "footer", "dialog"})
"""Boilerplate by name."""


@lru_cache(1 << 15)
def is_boilerplate(name: str, attributes: str | None) -> bool:
    """True if a tag opens an element that is hidden or no part of the text."""
    if name in OUTSIDE or not attributes:
        return name in OUTSIDE
    if _HIDDEN.search(attributes):
        return True
    names = " ".join(_NAMES.findall(attributes)).lower()
    return bool(names) and _NAMED.search(names) is not None
