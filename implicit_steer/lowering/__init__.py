"""escnn's modules, or irreps, are lowered to a :class:`~implicit_steer.plan.Plan`: sampling, intertwiners,
Clebsch-Gordan coefficients."""
