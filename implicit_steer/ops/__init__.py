"""The operator ``(plan, parameters, graph, features) → features``: its backends, and which of them runs."""
