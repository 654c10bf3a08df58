//! One NSM without its transport: a request goes in, a response comes out, the registers change accordingly.
//!
//! [`Module`] is used by [`crate::virtqueue`] from one thread; [`Identity`] is what is slow to make at launch (keys, certificates,
//! the image's hash), so that a module can describe itself and give random numbers before it is there. Semantics: docs/nsm.md.

use crate::pcr::{InitialPcrs, PcrBank};
use crate::request::{self, Request};
use crate::response::{ErrorCode, Response};
use nitroxide_attestation::{Claims, MAX_FIELD_BYTES, MAX_PCRS, Signer, SignerError, Timestamp, in_one_line};

/// How many bytes GetRandom gives.
pub const RANDOM_BYTES: usize = 256;

/// Major, minor, patch, as the devices of today describe themselves.
const VERSION: [u16; 3] = [1, 0, 0];

/// What the module needs before it can speak about registers.
#[derive(Debug, Clone)]
pub struct Identity {
    /// Signs documents.
    pub signer: Signer,
    /// What was measured at boot.
    pub pcrs: InitialPcrs,
}

/// How far the identity is.
#[derive(Debug)]
enum Readiness {
    Waiting,
    Ready(Box<Signer>),
    Failed,
}

/// The state of one enclave's NSM. It lives as long as the enclave: a driver that is reloaded finds its locks closed.
#[derive(Debug)]
pub struct Module {
    module_id: String,
    debug: bool,
    pcrs: PcrBank,
    readiness: Readiness,
    /// Why the last document could not be signed, as the log has it: a guest that asks again and again does not fill the log.
    logged: Option<String>,
}

impl Module {
    /// A module that has a name, but no identity yet.
    #[must_use]
    pub const fn new(module_id: String, debug: bool) -> Self {
        Self { module_id, debug, pcrs: PcrBank::new(), readiness: Readiness::Waiting, logged: None }
    }

    /// Takes the boot measurements and the signer; `None` says that there will be none. Only the first call counts.
    pub fn identify(&mut self, identity: Option<Identity>) {
        if !matches!(self.readiness, Readiness::Waiting) {
            return;
        }
        self.readiness = match identity {
            Some(Identity { signer, pcrs }) => {
                self.pcrs.measure(&pcrs, self.debug);
                Readiness::Ready(Box::new(signer))
            }
            None => Readiness::Failed,
        };
    }

    /// Whether [`Self::identify`] has been called: whether every request can be answered.
    #[must_use]
    pub const fn is_identified(&self) -> bool {
        !matches!(self.readiness, Readiness::Waiting)
    }

    /// Answers the bytes of one request. Without an identity, a request about registers is answered `InternalError`.
    #[must_use]
    pub fn answer(&mut self, bytes: &[u8]) -> Vec<u8> {
        self.answer_decoded(request::decode(bytes))
    }

    /// Answers what [`request::decode`] gave.
    #[must_use]
    pub fn answer_decoded(&mut self, request: Result<Request, ErrorCode>) -> Vec<u8> {
        match request.and_then(|request| self.apply(&request)) {
            Ok(response) => response,
            Err(code) => Response::Error(code).encode(),
        }
    }

    /// The registers, for looking at.
    #[must_use]
    pub const fn pcrs(&self) -> &PcrBank {
        &self.pcrs
    }

    fn apply(&mut self, request: &Request) -> Result<Vec<u8>, ErrorCode> {
        if request.concerns_registers() && !matches!(self.readiness, Readiness::Ready(_)) {
            return Err(ErrorCode::InternalError);
        }
        match request {
            Request::DescribePcr { index } => {
                let (lock, data) = self.pcrs.describe(*index)?;
                Ok(Response::DescribePcr { lock, data: &data }.encode())
            }
            Request::ExtendPcr { index, data } => {
                let data = self.pcrs.extend(*index, data)?;
                Ok(Response::ExtendPcr { data: &data }.encode())
            }
            Request::LockPcr { index } => {
                self.pcrs.lock(*index)?;
                Ok(Response::LockPcr.encode())
            }
            Request::LockPcrs { range } => {
                self.pcrs.lock_below(*range)?;
                Ok(Response::LockPcrs.encode())
            }
            Request::DescribeNsm => {
                let locked: Vec<u16> = self.pcrs.locked().collect();
                let module_id = &self.module_id;
                Ok(Response::DescribeNsm { version: VERSION, module_id, max_pcrs: MAX_PCRS, locked_pcrs: &locked }.encode())
            }
            Request::Attestation { user_data, nonce, public_key } => {
                self.attest(user_data.as_deref(), nonce.as_deref(), public_key.as_deref())
            }
            Request::GetRandom => random(),
        }
    }

    fn attest(&mut self, user_data: Option<&[u8]>, nonce: Option<&[u8]>, public_key: Option<&[u8]>) -> Result<Vec<u8>, ErrorCode> {
        if [user_data, nonce, public_key].into_iter().flatten().any(|field| field.len() > MAX_FIELD_BYTES) {
            return Err(ErrorCode::InputTooLarge);
        }
        let Readiness::Ready(signer) = &mut self.readiness else { return Err(ErrorCode::InternalError) };
        let pcrs = self.pcrs.attested();
        let document = match signer.document(Timestamp::now().0, &Claims { pcrs: &pcrs, public_key, user_data, nonce }) {
            Ok(document) => document,
            Err(SignerError::Rests(_)) => return Err(ErrorCode::InternalError),
            Err(error) => {
                let text = in_one_line(&error);
                if self.logged.as_ref() != Some(&text) {
                    tracing::error!(error = &error as &dyn std::error::Error, "An attestation document could not be signed");
                    self.logged = Some(text);
                }
                return Err(ErrorCode::InternalError);
            }
        };
        self.logged = None;
        Ok(Response::Attestation { document: &document }.encode())
    }
}

fn random() -> Result<Vec<u8>, ErrorCode> {
    let mut random = [0; RANDOM_BYTES];
    getrandom::fill(&mut random).map_err(|error| {
        tracing::error!(%error, "The host gives no random numbers");
        ErrorCode::InternalError
    })?;
    Ok(Response::GetRandom { random: &random }.encode())
}
