"""What the Hub takes as license and language of a model; it refuses others, or files the model under nothing."""

import locale
import re

from .messages import nearest

# https://huggingface.co/docs/hub/repositories-licenses
LICENSES = (
    "apache-2.0", "mit", "openrail", "bigscience-openrail-m", "creativeml-openrail-m", "bigscience-bloom-rail-1.0",
    "bigcode-openrail-m", "afl-3.0", "artistic-2.0", "bsl-1.0", "bsd", "bsd-2-clause", "bsd-3-clause",
    "bsd-3-clause-clear", "c-uda", "cc", "cc0-1.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0",
    "cc-by-sa-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-3.0",
    "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cdla-sharing-1.0",
    "cdla-permissive-1.0", "cdla-permissive-2.0", "wtfpl", "ecl-2.0", "epl-1.0", "epl-2.0", "etalab-2.0", "eupl-1.1",
    "eupl-1.2", "agpl-3.0", "gfdl", "gpl", "gpl-2.0", "gpl-3.0", "lgpl", "lgpl-2.1", "lgpl-3.0", "isc", "h-research",
    "intel-research", "lppl-1.3c", "ms-pl", "apple-ascl", "apple-amlr", "mpl-2.0", "odc-by", "odbl", "openmdw-1.0",
    "openrail++", "osl-3.0", "postgresql", "ofl-1.1", "ncsa", "unlicense", "zlib", "pddl", "lgpl-lr",
    "deepfloyd-if-license", "fair-noncommercial-research-license", "llama2", "llama3", "llama3.1", "llama3.2",
    "llama3.3", "llama4", "grok2-community", "gemma", "unknown",
)  # fmt: skip
# ISO 639-1. A language without such a code has one of three letters (ISO 639-3)
TWO_LETTERS = (
    "aa ab ae af ak am an ar as av ay az ba be bg bi bm bn bo br bs ca ce ch co cr cs cu cv cy da de dv dz ee el en eo "
    "es et eu fa ff fi fj fo fr fy ga gd gl gn gu gv ha he hi ho hr ht hu hy hz ia id ie ig ii ik io is it iu ja jv ka "
    "kg ki kj kk kl km kn ko kr ks ku kv kw ky la lb lg li ln lo lt lu lv mg mh mi mk ml mn mr ms mt my na nb nd ne ng "
    "nl nn no nr nv ny oc oj om or os pa pi pl ps pt qu rm rn ro ru rw sa sc sd se sg si sk sl sm sn so sq sr ss st su "
    "sv sw ta te tg th ti tk tl tn to tr ts tt tw ty ug uk ur uz ve vi vo wa wo xh yi yo za zh zu"
)
LANGUAGES = TWO_LETTERS.split(" ")


def check_metadata(language: str | None, license: str | None) -> None:
    """Refuses what the Hub does not know.

    Raises:
        ValueError: names the nearest id that it knows.
    """
    if license is not None and license not in LICENSES:
        raise ValueError(
            f"Expected a license by its id on the Hub, such as apache-2.0 or mit, got {license!r}."
            f"{nearest(license.lower(), LICENSES) or ' See https://huggingface.co/docs/hub/repositories-licenses.'}"
        )
    if language is not None and language not in LANGUAGES and not re.fullmatch("[a-z]{3}|multilingual", language):
        # the standard library knows the names of common languages, and forms such as en_US
        code = locale.locale_alias.get(language.lower().replace("-", "_"), "")[:2]
        raise ValueError(
            f"Expected the code of a language, of two letters (ISO 639-1) or three (639-3), or multilingual, got "
            f"{language!r}.{f' Did you mean {code}?' if code in LANGUAGES else ' The one of English is en.'}"
        )
