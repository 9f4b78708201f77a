"""PostgreSQL's programs and protocol, as the postgres store needs them."""
