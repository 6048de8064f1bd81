from embedded_checks import EmbeddedPolicyChecks


class TestTinyPi05(EmbeddedPolicyChecks):
    name = "tiny-pi05"
