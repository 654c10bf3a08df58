//! The RX queue: what the guest gets.
//!
//! Buffers are the guest's and may be scarce: each connection sends one packet, then goes to the end of the queue of turns; resets, which
//! belong to nobody, have a turn after every packet.

use virtio_queue::{QueueOwnedT, QueueT};

use super::{Device, Rings, has_more, publish};
use crate::chain::{Direction, Segments};
use crate::connection::Produced;
use crate::limits;
use crate::packet::HEADER_BYTES;

impl Device {
    /// Fills a batch of buffers; `true` if there may be more to do now.
    pub(super) fn give_packets(&mut self, rings: &mut Rings<'_, '_>, interrupt: &mut bool) -> bool {
        let memory = rings.memory;
        let mut segments = Segments::new();
        let mut finished = Vec::with_capacity(limits::BATCH);
        let mut more = true;
        while finished.len() < limits::BATCH {
            if self.resets.is_empty() && !self.table.has_turns() {
                more = false;
                break;
            }
            let Some(chain) = rings.rx.pop_descriptor_chain(memory) else {
                // The guest is asked for a kick only when packets wait.
                more = has_more(memory, rings.rx);
                break;
            };
            let head = chain.head_index();
            if segments.fill(memory, chain, Direction::ToGuest).is_err() || segments.bytes() < HEADER_BYTES {
                self.statistics.malformed += 1;
                finished.push((head, 0));
                continue;
            }
            match self.give_packet(&segments) {
                Some(bytes) => finished.push((head, bytes)),
                None => {
                    rings.rx.go_to_previous_position();
                    more = false;
                    break;
                }
            }
        }
        *interrupt |= publish(memory, rings.rx, &mut finished);
        more
    }

    /// Fills one buffer and returns how many bytes of it are used; `None` if nobody has anything to send.
    fn give_packet(&mut self, segments: &Segments<'_>) -> Option<u32> {
        // Resets and connections alternate: a guest that provokes resets does not starve its connections, nor they its answers.
        self.reset_has_turn = !self.reset_has_turn;
        if self.reset_has_turn {
            self.give_reset(segments).or_else(|| self.give_turn(segments))
        } else {
            self.give_turn(segments).or_else(|| self.give_reset(segments))
        }
    }

    fn give_reset(&mut self, segments: &Segments<'_>) -> Option<u32> {
        segments.write_header(&self.resets.pop_front()?.to_bytes());
        u32::try_from(HEADER_BYTES).ok()
    }

    fn give_turn(&mut self, segments: &Segments<'_>) -> Option<u32> {
        while let Some(token) = self.table.next_turn() {
            let Some(connection) = self.table.connection_mut(token) else { continue };
            let produced = connection.next_packet(segments);
            self.settle(token);
            match produced {
                Produced::Nothing => {}
                Produced::BufferTooSmall => return Some(0),
                Produced::Packet(header, payload) => {
                    segments.write_header(&header.to_bytes());
                    self.statistics.bytes_to_guest += payload as u64;
                    return u32::try_from(HEADER_BYTES + payload).ok();
                }
            }
        }
        None
    }
}
