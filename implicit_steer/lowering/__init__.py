"""What escnn builds → a :class:`~implicit_steer.plan.Plan`: sampling, intertwiners, Clebsch-Gordan coefficients."""
