//! Drives any `/dev/nitro_enclaves`, writes down every answer, and compares two such transcripts.
