"""Generated from proto/migrate/v1 by migrate.rpc.generate. Do not edit."""
