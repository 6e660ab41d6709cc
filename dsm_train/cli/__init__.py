"""Command line: recipes and arguments become a typed configuration; one clear line says what is wrong in them."""

from dsm_train.cli.errors import tell_torchrun, user_errors
from dsm_train.cli.fingerprint import check_alike, digest, fingerprint
from dsm_train.cli.load import load_config, parse_section, to_yaml

__all__ = [
    "check_alike",
    "digest",
    "fingerprint",
    "load_config",
    "parse_section",
    "tell_torchrun",
    "to_yaml",
    "user_errors",
]
