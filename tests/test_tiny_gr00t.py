from embedded_checks import EmbeddedPolicyChecks


class TestTinyGr00t(EmbeddedPolicyChecks):
    name = "tiny-gr00t"
