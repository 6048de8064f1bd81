import pytest
from embedded_checks import EmbeddedPolicyChecks

pytestmark = pytest.mark.long


class TestTinyPi05(EmbeddedPolicyChecks):
    name = "tiny-pi05"
