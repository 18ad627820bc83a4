"""The paper's figures and tables: ``python -m implicit_steer figure``, or the functions of these modules.

Each is a module with ``add_arguments(parser)`` and ``main(args)``.
"""
