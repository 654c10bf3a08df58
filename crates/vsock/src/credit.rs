//! Credit: who may send how many bytes (virtio 1.3, section 5.10.6.3; all counters wrap modulo 2^32).
//!
//! [`ReceiveCredit`] is our receive buffer as the guest sees it: what it was promised, what came, what went on to the host. [`SendCredit`]
//! is the guest's receive buffer as we see it. Both are pure arithmetic; the property tests below run them against a model.

/// Our receive buffer for one connection, and what the guest knows about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReceiveCredit {
    /// Size of the buffer in bytes, constant: what every packet to the guest says.
    buffer_bytes: u32,
    /// Bytes received from the guest so far.
    received: u32,
    /// Bytes given on to the host so far.
    forwarded: u32,
    /// What did we last tell the guest about `forwarded`?
    told: u32,
}

/// The guest sent more than it was allowed to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Overrun;

impl ReceiveCredit {
    /// An empty buffer of `buffer_bytes` bytes.
    #[must_use]
    pub fn new(buffer_bytes: u32) -> Self {
        Self { buffer_bytes, received: 0, forwarded: 0, told: 0 }
    }

    /// Size of the buffer in bytes.
    #[must_use]
    pub fn buffer_bytes(&self) -> u32 {
        self.buffer_bytes
    }

    /// Bytes that came and have not gone on yet.
    #[must_use]
    pub fn held(&self) -> u32 {
        self.received.wrapping_sub(self.forwarded)
    }

    /// Notes `bytes` from the guest.
    ///
    /// # Errors
    ///
    /// [`Overrun`] if the buffer cannot hold them; nothing is noted then. The measure is the room that truly is there, which is never less
    /// than what the guest was told.
    pub fn receive(&mut self, bytes: u32) -> Result<(), Overrun> {
        if bytes > self.buffer_bytes - self.held() {
            return Err(Overrun);
        }
        self.received = self.received.wrapping_add(bytes);
        Ok(())
    }

    /// Notes that `bytes`, at most [`held`](Self::held), went on to the host (or were thrown away because the host takes no more).
    pub fn forward(&mut self, bytes: u32) {
        debug_assert!(bytes <= self.held());
        self.forwarded = self.forwarded.wrapping_add(bytes.min(self.held()));
    }

    /// The value for the next packet's `fwd_cnt`; from now on the guest knows it.
    pub fn tell(&mut self) -> u32 {
        self.told = self.forwarded;
        self.forwarded
    }

    /// Whether the guest should be told now, with a packet for the purpose if no other goes.
    ///
    /// True when an eighth of the buffer became free since it last heard, or when all that came has gone on and the guest believes that less
    /// than half of the buffer is free. So a guest that waits for room always hears of it: what it waits for either stays in the buffer (then
    /// this is asked again) or has gone on.
    #[must_use]
    pub fn news_due(&self) -> bool {
        let news = self.forwarded.wrapping_sub(self.told);
        let believed_held = self.received.wrapping_sub(self.told);
        news > 0 && (news >= self.buffer_bytes / 8 || (self.held() == 0 && believed_held > self.buffer_bytes / 2))
    }
}

/// The guest's receive buffer for one connection, as far as its packets told.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct SendCredit {
    /// Size of the guest's buffer in bytes.
    buffer_bytes: u32,
    /// Bytes its program took out so far.
    forwarded: u32,
    /// Bytes we sent so far.
    sent: u32,
}

impl SendCredit {
    /// Takes over what a packet of the guest says.
    pub fn update(&mut self, buffer_bytes: u32, forwarded: u32) {
        self.buffer_bytes = buffer_bytes;
        self.forwarded = forwarded;
    }

    /// How many bytes may be sent now. A guest that says nonsense (more taken out than was sent, a buffer that shrank) gets 0.
    #[must_use]
    pub fn available(&self) -> u32 {
        self.buffer_bytes.saturating_sub(self.sent.wrapping_sub(self.forwarded))
    }

    /// Notes that `bytes`, at most [`available`](Self::available), were sent.
    pub fn send(&mut self, bytes: u32) {
        debug_assert!(bytes <= self.available());
        self.sent = self.sent.wrapping_add(bytes);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Starts every counter just before the wrap, so that the property tests cross it.
    const BEFORE_WRAP: u32 = u32::MAX - 1000;

    #[derive(Debug, Clone)]
    enum Step {
        Receive(u32),
        Forward(u32),
        Tell,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![(0..3000u32).prop_map(Step::Receive), (0..3000u32).prop_map(Step::Forward), Just(Step::Tell)]
    }

    proptest! {
        #[test]
        fn receive_credit_agrees_with_a_model_of_unbounded_integers(buffer in 1..4096u32, steps in proptest::collection::vec(step(), 0..200)) {
            let mut credit = ReceiveCredit { buffer_bytes: buffer, received: BEFORE_WRAP, forwarded: BEFORE_WRAP, told: BEFORE_WRAP };
            let (mut received, mut forwarded, mut told) = (0u64, 0u64, 0u64);
            for step in steps {
                match step {
                    Step::Receive(bytes) => {
                        let fits = received + u64::from(bytes) - forwarded <= u64::from(buffer);
                        prop_assert_eq!(credit.receive(bytes).is_ok(), fits);
                        if fits {
                            received += u64::from(bytes);
                        }
                    }
                    Step::Forward(bytes) => {
                        let bytes = bytes.min(credit.held());
                        credit.forward(bytes);
                        forwarded += u64::from(bytes);
                    }
                    Step::Tell => {
                        let value = credit.tell();
                        told = forwarded;
                        prop_assert_eq!(u64::from(value.wrapping_sub(BEFORE_WRAP)), forwarded);
                    }
                }
                prop_assert_eq!(u64::from(credit.held()), received - forwarded);
                // No guest waits for ever: nothing held, nothing due to be told means that it believes in at least half of the buffer.
                if received == forwarded && !credit.news_due() {
                    prop_assert!(received - told <= u64::from(buffer / 2) || forwarded == told);
                }
            }
        }

        #[test]
        fn send_credit_never_lets_more_into_the_guest_than_its_buffer(buffer in 0..5000u32, steps in proptest::collection::vec((0..3000u32, 0..3000u32), 0..100)) {
            let mut credit = SendCredit { buffer_bytes: buffer, forwarded: BEFORE_WRAP, sent: BEFORE_WRAP };
            let (mut sent, mut taken) = (0u64, 0u64);
            for (send, take) in steps {
                let bytes = send.min(credit.available());
                credit.send(bytes);
                sent += u64::from(bytes);
                prop_assert!(sent - taken <= u64::from(buffer));
                taken = sent.min(taken + u64::from(take));
                #[expect(clippy::cast_possible_truncation, reason = "the wrap is what is tested")]
                credit.update(buffer, BEFORE_WRAP.wrapping_add(taken as u32));
            }
        }
    }

    #[test]
    fn guest_that_claims_more_than_was_sent_gets_no_credit() {
        let mut credit = SendCredit::default();
        credit.update(1000, 1);
        assert_eq!(credit.available(), 0);
    }

    #[test]
    fn a_buffer_that_shrinks_below_what_is_in_flight_leaves_no_credit() {
        let mut credit = SendCredit::default();
        credit.update(1000, 0);
        credit.send(800);
        credit.update(500, 0);
        assert_eq!(credit.available(), 0);
    }

    #[test]
    fn a_full_buffer_that_drains_is_told() {
        let mut credit = ReceiveCredit::new(800);
        credit.receive(800).unwrap();
        assert!(!credit.news_due());
        credit.forward(99);
        assert!(!credit.news_due());
        credit.forward(1);
        assert!(credit.news_due());
        credit.tell();
        assert!(!credit.news_due());
    }
}
