"""What leaves the house: shards, card, licence join, provenance, contact sheets and the report page."""
