//! Answers of bounded size. The client reads an answer to a list whole, and a watch line by line, however long
//! they are; a list is one line, too.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use axum::BoxError;
use axum::body::Bytes;
use http_body::{Body, Frame};

/// Bytes of a line: a page of 200 EndpointSlices with 1000 endpoints each is less than half of it.
pub(super) const LINE: usize = 128 << 20;

/// A body without longer lines.
pub(super) struct Bounded<B> {
    body: B,
    /// Bytes since the last line began.
    line: usize,
}

impl<B> Bounded<B> {
    pub(super) fn new(body: B) -> Self {
        Self { body, line: 0 }
    }

    fn note(&mut self, data: &[u8]) -> io::Result<()> {
        let mut pieces = data.split(|byte| *byte == b'\n');
        self.line += pieces.next().map_or(0, <[u8]>::len);
        for piece in pieces {
            self.line = piece.len();
        }
        if self.line <= LINE {
            return Ok(());
        }
        let error = format!("a line of the answer is longer than {} MiB", LINE >> 20);
        Err(io::Error::new(io::ErrorKind::FileTooLarge, error))
    }
}

impl<B: Body<Data = Bytes, Error = BoxError> + Unpin> Body for Bounded<B> {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(context));
        if let Some(Ok(frame)) = &frame
            && let Some(data) = frame.data_ref()
            && let Err(error) = self.note(data)
        {
            return Poll::Ready(Some(Err(error.into())));
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_has_its_own_room() {
        let mut bounded = Bounded::new(());
        let half = vec![b'x'; LINE / 2];
        for end in ["", "\n", "", "\nxx\n", "", ""] {
            bounded.note(&half).unwrap();
            bounded.note(end.as_bytes()).unwrap();
        }
        assert!(bounded.note(b"x").is_err());
    }
}
