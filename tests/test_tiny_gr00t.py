import pytest
from embedded_checks import EmbeddedPolicyChecks

pytestmark = pytest.mark.long


class TestTinyGr00t(EmbeddedPolicyChecks):
    name = "tiny-gr00t"
