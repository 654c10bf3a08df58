//! AWS's own client library against our module: it writes the requests and reads the answers.
#![expect(clippy::unwrap_used, reason = "a test ends where something unexpected happens")]

use aws_nitro_enclaves_nsm_api::api::{AttestationDoc, Digest, ErrorCode, Request, Response};
use nitroxide_attestation::Signer;
use nitroxide_nsm::{Identity, InitialPcrs, Module};
use serde_bytes::ByteBuf;

const MODULE_ID: &str = "i-0000000000000000-enc0000000000000001";

fn module() -> Module {
    let signer = Signer::local(MODULE_ID, 1_795_500_000_000).unwrap();
    let pcrs = InitialPcrs::of_image([1; 48], [2; 48], [3; 48], None).with_instance_id("i-0000000000000000");
    let mut module = Module::new(MODULE_ID.into(), false);
    module.identify(Some(Identity { signer, pcrs }));
    module
}

fn ask(module: &mut Module, request: &Request) -> Response {
    serde_cbor::from_slice(&module.answer(&serde_cbor::to_vec(request).unwrap())).unwrap()
}

fn assert_refused(response: &Response) {
    assert!(matches!(response, Response::Error(ErrorCode::ReadOnlyIndex)), "{response:?}");
}

#[test]
fn the_description_is_what_it_expects() {
    match ask(&mut module(), &Request::DescribeNSM) {
        Response::DescribeNSM { version_major: 1, version_minor: 0, version_patch: 0, module_id, max_pcrs: 32, locked_pcrs, digest } => {
            assert_eq!(module_id, MODULE_ID);
            assert!(locked_pcrs.into_iter().eq(0..16));
            assert!(matches!(digest, Digest::SHA384));
        }
        other => panic!("{other:?}"),
    }
}

/// The course of AWS's own check of a device, in short: registers at boot, locks, extending, locks again.
#[test]
fn registers_go_through_a_life_as_it_expects() {
    let mut module = module();
    for index in 0..32 {
        let Response::DescribePCR { lock, data } = ask(&mut module, &Request::DescribePCR { index }) else { panic!("{index}") };
        assert_eq!((lock, data.len()), (index < 16, 48));
        assert_eq!(data != [0; 48], [0, 1, 2, 4].contains(&index), "{index}");
    }
    for index in 0..16 {
        assert_refused(&ask(&mut module, &Request::LockPCR { index }));
    }
    for index in 16..32 {
        let response = ask(&mut module, &Request::ExtendPCR { index, data: vec![1, 2, 3] });
        assert!(matches!(&response, Response::ExtendPCR { data } if data.len() == 48 && *data != [0; 48]), "{response:?}");
        assert!(matches!(ask(&mut module, &Request::LockPCR { index }), Response::LockPCR));
    }
    assert!(matches!(ask(&mut module, &Request::LockPCRs { range: 32 }), Response::LockPCRs));
    assert!(matches!(ask(&mut module, &Request::LockPCRs { range: 33 }), Response::Error(ErrorCode::InvalidIndex)));
    for index in 0..32 {
        assert_refused(&ask(&mut module, &Request::ExtendPCR { index, data: vec![1, 2, 3] }));
    }
}

#[test]
fn random_numbers_arrive() {
    let response = ask(&mut module(), &Request::GetRandom);
    assert!(matches!(&response, Response::GetRandom { random } if random.len() == 256), "{response:?}");
}

#[test]
fn a_document_with_three_fields_of_1024_bytes_is_read() {
    let field = |byte: u8| Some(ByteBuf::from(vec![byte; 1024]));
    let request = Request::Attestation { user_data: field(1), nonce: field(2), public_key: field(3) };
    let Response::Attestation { document } = ask(&mut module(), &request) else { panic!("no document") };
    let parts: serde_cbor::Value = serde_cbor::from_slice(&document).unwrap();
    let serde_cbor::Value::Array(parts) = parts else { panic!("no COSE_Sign1") };
    let serde_cbor::Value::Bytes(payload) = &parts[2] else { panic!("no payload") };
    let document = AttestationDoc::from_binary(payload).unwrap();
    assert_eq!((document.user_data, document.nonce, document.public_key), (field(1), field(2), field(3)));
    assert_eq!(document.module_id, MODULE_ID);
    assert_eq!(document.pcrs.len(), 16);
    assert_eq!(document.pcrs[&1], vec![2; 48]);
    assert_eq!(document.cabundle.len(), 4);
}

#[test]
fn a_document_without_fields_is_read() {
    let request = Request::Attestation { user_data: None, nonce: None, public_key: None };
    assert!(matches!(ask(&mut module(), &request), Response::Attestation { .. }));
}
