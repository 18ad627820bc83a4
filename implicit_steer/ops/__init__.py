"""The operator ``(plan, parameters, graph, features) → features``: its engines, and which of them runs."""
