"""An exhaustive search over the handover's two machines in a small world.

The machines are the product's own (``SourceHandover``, ``DestinationHandover``). What is
modelled is what is around them: two copies, two journals, two agents that crash between
any two effects, and a network.
"""
