//! Pages that lie behind one another in physical memory, joined: [`Runs`]. The device is told runs, not pages.

use nitroxide_abi::Gpa;

use crate::client::Pages;

/// Physically contiguous pages of one call.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Run {
    /// Physical address of the first byte.
    pub gpa: Gpa,
    /// Bytes.
    pub size: u64,
    /// Pages that it is made of.
    pub pages: usize,
}

/// The runs of pages in the order of their virtual addresses: a page joins the run before it only if it starts where that ends.
///
/// Pages that are adjacent but descending are separate runs, and so are the pages of two calls, as in mainline.
#[derive(Debug)]
pub struct Runs<'a, P> {
    pages: &'a P,
    next: usize,
}

impl<'a, P: Pages> Runs<'a, P> {
    /// The runs of all these pages.
    pub fn new(pages: &'a P) -> Self {
        Self { pages, next: 0 }
    }
}

impl<P: Pages> Iterator for Runs<'_, P> {
    type Item = Run;

    fn next(&mut self) -> Option<Run> {
        let first = self.pages.get(self.next)?;
        let mut run = Run { gpa: first.gpa, size: first.size, pages: 1 };
        self.next = self.next.saturating_add(1);
        while let Some(page) = self.pages.get(self.next) {
            let joined = run.size.checked_add(page.size).filter(|_| run.gpa.0.checked_add(run.size) == Some(page.gpa.0));
            let Some(size) = joined else { break };
            run = Run { size, pages: run.pages.saturating_add(1), ..run };
            self.next = self.next.saturating_add(1);
        }
        Some(run)
    }
}
